"""Location encoders: the released ones number for number, harmonics that are orthonormal, poles and the date line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bench_index import geoclip_folder
from numpy.polynomial.legendre import leggauss
from pyproj import Proj, Transformer
from safetensors.torch import load_file
from tiny import OneLine
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from rag_geotoken.encoders.alignment import LocationEncoder as PromisedEncoder
from rag_geotoken.encoders.location import (
    HarmonicEncoder,
    LocationConfig,
    LocationEncoder,
    UnitVectorEncoder,
    embed_places,
    equal_earth,
    mercator,
    spherical_harmonics,
)

DATA = Path(__file__).parents[1] / "data"
SEAMS = [[90.0, 0.0], [-90.0, 0.0], [90.0, 180.0], [-90.0, -180.0], [12.0, 180.0], [12.0, -180.0], [0.0, 0.0]]


def random_places(count: int, seed: int = 0) -> Tensor:
    """(count, 2) uniform by area."""
    rng = np.random.default_rng(seed)
    lat = np.degrees(np.arcsin(rng.uniform(-1, 1, count)))
    return torch.from_numpy(np.column_stack([lat, rng.uniform(-180, 180, count)]))


def by_formula(encoder: LocationEncoder) -> dict[str, Tensor]:
    """Weights that need no file and no random generator: digits of sines. With them the reference was computed."""
    state = {}
    for i, (name, value) in enumerate(sorted(encoder.state_dict().items())):
        phases = 43758.5453 * torch.sin(12.9898 * torch.arange(value.numel(), dtype=torch.float64) + i)
        scale = (1.0, 16.0, 256.0)[int(name[6])] if name.endswith(".b") else (6.0 / value.shape[-1]) ** 0.5
        state[name] = (scale * (2.0 * (phases - phases.floor()) - 1.0)).float().reshape(value.shape)
    return state


@pytest.mark.parametrize("projection", ["equal_earth", "mercator"])
def test_the_encoder_is_the_released_codes(projection: str) -> None:
    reference = load_file(DATA / "location_encoder_formula.safetensors")
    encoder = LocationEncoder(LocationConfig(projection)).eval()
    encoder.load_state_dict(by_formula(encoder))
    with torch.no_grad():
        embeddings = encoder(reference["lat_lng_deg"])
    assert reference[f"{projection}_embedding"].std() > 1
    torch.testing.assert_close(embeddings, reference[f"{projection}_embedding"], rtol=0, atol=2e-5)  # values of about 2


@pytest.mark.parametrize("projection", ["equal_earth", "mercator"])
def test_with_the_released_weights_to_five_digits(projection: str) -> None:
    package = geoclip_folder()
    if package is None:
        pytest.skip("needs the package geoclip")
    weights = package / "model" / "weights" / "location_encoder_weights.pth"
    reference = load_file(DATA / "location_encoder_reference.safetensors")
    encoder = LocationEncoder(LocationConfig(projection)).eval()
    encoder.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        for places in (reference["lat_lng_deg"], reference["lat_lng_deg"].double()):
            torch.testing.assert_close(encoder(places), reference[f"{projection}_embedding"], rtol=0, atol=1e-5)


def test_projections_are_those_of_proj() -> None:
    places = torch.cat([random_places(500), torch.tensor(SEAMS).double(), torch.tensor([[89.99, 3.0], [-85.06, 9.0]])])
    lat, lon = places.numpy().T
    x, y = Proj("+proj=eqearth +R=1")(lon, lat)
    np.testing.assert_allclose(equal_earth(places), np.column_stack([x, y]) * 66.50336 / 180, atol=2e-6)
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:3857", always_xy=True).transform(lon, lat)
    np.testing.assert_allclose(mercator(places), np.column_stack([y, x]) / 20037508.3427892, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("projection", ["equal_earth", "mercator"])
def test_poles_and_date_line_are_finite(projection: str) -> None:
    encoder = LocationEncoder(LocationConfig(projection, hidden=32)).eval()
    for places in (torch.tensor(SEAMS), torch.tensor(SEAMS).double()):
        assert torch.isfinite(encoder(places)).all()


SEAMLESS = pytest.mark.parametrize("name", ["unit vector", "harmonics"])


def seamless_encoders() -> dict[str, nn.Module]:
    """The two without seams, in full size, high frequencies and all."""
    torch.manual_seed(0)
    return {"unit vector": UnitVectorEncoder(256, (2.0, 12.0, 60.0, 250.0), 96, 512), "harmonics": HarmonicEncoder()}


@SEAMLESS
def test_poles_and_date_line_are_neither_seams_nor_jumps(name: str) -> None:
    encoder = seamless_encoders()[name].eval()
    # A place has one embedding however it is written.
    lat = torch.tensor([-60.0, 0.0, 66.5, 90.0, 90.0, -90.0])
    west = torch.stack([lat, torch.tensor([-180.0, -180.0, -180.0, 0.0, -180.0, 20.0])], dim=1)
    east = torch.stack([lat, torch.tensor([180.0, 180.0, 180.0, 123.4, 90.0, -160.0])], dim=1)
    # Two places 2 m apart on either side, against what 2 m makes elsewhere.
    tiny = 1e-5
    across = [[0.0, 180 - tiny], [0.0, tiny - 180], [90 - tiny, 20.0], [90 - tiny, -160.0], [-90 + tiny, 5.0]]
    across += [[-90 + tiny, -175.0], [0.0, 50 - tiny], [0.0, 50 + tiny]]
    with torch.no_grad():
        first, second = encoder(west), encoder(east)
        pairs = encoder(torch.tensor(across, dtype=torch.float64)).view(4, 2, -1)
    assert torch.isfinite(first).all()
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    steps = (pairs[:, 0] - pairs[:, 1]).norm(dim=-1)
    assert steps.max() < 10 * steps[3] + 1e-6 and steps[3] < 0.01


def test_near_places_are_nearer_than_far_ones() -> None:
    encoder = seamless_encoders()["unit vector"]
    with torch.no_grad():
        place, near, far = encoder(torch.tensor([[48.85, 2.35], [48.86, 2.36], [-33.9, 151.2]]))
    assert cosine_similarity(place, near, dim=0) > 0.99 > cosine_similarity(place, far, dim=0)


@SEAMLESS
def test_latitude_comes_first(name: str) -> None:
    # Two places 1 m apart beside the pole, and the same numbers the other way round, far apart.
    encoder = seamless_encoders()[name]
    with torch.no_grad():
        a, b = encoder(torch.tensor([[89.99999, 0.0], [89.99999, 90.0]]))
        c, d = encoder(torch.tensor([[0.0, 89.99999], [90.0, 89.99999]]))
    assert torch.dist(a, b) < 0.01 * torch.dist(c, d)


def test_harmonics_are_orthonormal() -> None:
    # Exact quadrature: Gauss-Legendre in the sine of the latitude, equal steps in longitude.
    degrees = 41
    node, weight = leggauss(degrees)
    lon = np.arange(2 * degrees) * 360.0 / (2 * degrees) - 180.0
    lat, lon = (axis.ravel() for axis in np.meshgrid(np.degrees(np.arcsin(node)), lon, indexing="ij"))
    values = spherical_harmonics(torch.from_numpy(np.column_stack([lat, lon])), degrees).numpy()
    area = np.repeat(weight, 2 * degrees) * np.pi / degrees
    assert values.shape == (len(lat), degrees**2) and area.sum() == pytest.approx(4 * np.pi)
    np.testing.assert_allclose(values.T @ (values * area[:, None]), np.eye(degrees**2), atol=1e-11)


def test_harmonics_of_a_degree_add_up_everywhere() -> None:
    # Unsoeld's theorem: the squares of a degree's harmonics add up to (2l + 1) / (4 pi) at every place.
    degrees = 120
    values = spherical_harmonics(torch.cat([torch.tensor(SEAMS).double(), random_places(20)]), degrees).numpy() ** 2
    sums = np.add.reduceat(values, np.arange(degrees) ** 2, axis=1)
    np.testing.assert_allclose(sums, np.tile((2 * np.arange(degrees) + 1) / (4 * np.pi), (27, 1)), rtol=1e-11)


def test_the_first_harmonics_by_hand() -> None:
    # SatCLIP's x, y, z: from the date line and the south pole.
    lat, lon = np.radians(random_places(10).numpy()).T
    x, y, z = -np.cos(lat) * np.cos(lon), -np.cos(lat) * np.sin(lon), -np.sin(lat)
    one, two = np.sqrt(3 / (4 * np.pi)), np.sqrt(15 / (4 * np.pi))
    wanted = [np.full(10, np.sqrt(1 / (4 * np.pi))), one * y, one * z, one * x]
    wanted += [two * x * y, two * y * z, two / np.sqrt(12) * (3 * z * z - 1), two * x * z, two / 2 * (x * x - y * y)]
    np.testing.assert_allclose(spherical_harmonics(random_places(10), 3).numpy(), np.column_stack(wanted), atol=1e-14)


def test_siren_as_satclip_has_it() -> None:
    torch.manual_seed(0)
    encoder, places = HarmonicEncoder(degrees=4, hidden=8, layers=2, dim=3).double(), random_places(6)
    state = encoder.state_dict()
    names = ["nnet.layers.0", "nnet.layers.1", "nnet.last_layer"]
    assert list(state) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    hidden = spherical_harmonics(places, 4)
    for name, phases in zip(names[:2], (30.0, 1.0), strict=True):
        hidden = torch.sin(phases * (hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"]))
    wanted = hidden @ state["nnet.last_layer.weight"].T + state["nnet.last_layer.bias"]
    torch.testing.assert_close(encoder(places), wanted)
    assert state["nnet.layers.0.weight"].abs().max() <= 1 / 16 < state["nnet.layers.1.weight"].abs().max()


@pytest.mark.parametrize("kind", ["projected", "unit vector", "harmonics"])
def test_phases_keep_their_precision_in_bfloat16(kind: str) -> None:
    torch.manual_seed(0)
    encoder = seamless_encoders().get(kind) or LocationEncoder(LocationConfig(sigmas=(256.0,)))
    places = random_places(40)
    with torch.no_grad():
        exact = encoder(places)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = encoder(places)
    assert cosine_similarity(exact, embeddings.float()).min() > 0.99


def test_saved_and_loaded(tmp_path: Path) -> None:
    config = LocationConfig("mercator", (2.0,), 8, 16, 4)
    made, places = LocationEncoder(config), random_places(9)
    made.save_pretrained(tmp_path)
    loaded = LocationEncoder.from_pretrained(tmp_path)
    assert loaded.config == config and not loaded.training
    assert {path.name for path in tmp_path.iterdir()} == {"location.json", "location.safetensors"}
    assert torch.equal(loaded(places), made(places)) and loaded(places).shape == (9, 4)


def test_what_does_not_fit_is_said(tmp_path: Path, one_line: OneLine) -> None:
    with one_line("no projection 'flat': choose equal_earth or mercator"):
        LocationEncoder(LocationConfig("flat"))
    with one_line(r"there is no .*location\.json"):
        PromisedEncoder.from_pretrained(tmp_path)
    LocationEncoder(LocationConfig("mercator", (2.0,), 8, 16, 4)).save_pretrained(tmp_path)
    (tmp_path / "location.json").write_text('{"degrees": 3}')
    with one_line("cannot be used as LocationEncoder weights"):
        PromisedEncoder.from_pretrained(tmp_path)


def test_embedded_places_have_length_one_in_any_batch() -> None:
    encoder, places, counts = LocationEncoder(LocationConfig(hidden=16)).eval(), random_places(50).numpy(), []
    vectors = embed_places(encoder, places, batch=7, advance=counts.append)
    assert vectors.shape == (50, 512) and vectors.dtype == np.float32 and sum(counts) == 50 and len(counts) == 8
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors, embed_places(encoder, places), atol=1e-6)
