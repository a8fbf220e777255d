"""Models of open_clip from a folder, a hub's cache and by tag: its own embeddings, its own pictures, one line else."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import OneLine
from tiny_clip import save_pictures
from tiny_open_clip import CLIP_CFG, SIGLIP_CFG, SIGLIP_PICTURES, save_open_clip, save_tokenizer

from rag_geotoken.cli.app import main
from rag_geotoken.encoders import Backbone, load_backbone
from rag_geotoken.encoders.clip import ClipEncoder
from rag_geotoken.encoders.open_clip import OpenClipEncoder
from rag_geotoken.peers.geoclip import GeoCLIP
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.storage import model_folder as model_folder

open_clip = pytest.importorskip("open_clip")
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXTS = ["a fjord with red houses", "Desert!", "", "x" * 300]
HUB = "someone/tiny"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("open-clip") / "clip", CLIP_CFG)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("open-clip") / "siglip", SIGLIP_CFG, SIGLIP_PICTURES)


@pytest.fixture
def folder(clip: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return shutil.copytree(clip, tmp_path / "copy")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's models, and no way to the hub itself."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    ask(monkeypatch, 9)
    return tmp_path / "hub"


def ask(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let the hub be at a port of this machine."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.model_info.__self__, "endpoint", f"http://127.0.0.1:{port}")


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    ask(monkeypatch, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def cached(hub: Path, name: str = HUB) -> Path:
    """Where the cache keeps a model."""
    inside = hub / f"models--{name.replace('/', '--')}"
    (inside / "refs").mkdir(parents=True)
    (inside / "refs" / "main").write_text("0" * 40)
    return inside / "snapshots" / ("0" * 40)


def configure(folder: Path, **changes: Any) -> None:
    """Change settings of the model (``vision_cfg``, ``text_cfg`` ...) or of its pictures (``preprocess_cfg``)."""
    config = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        inside = config if key == "preprocess_cfg" else config["model_cfg"]
        inside[key] = inside.get(key, {}) | value if isinstance(value, dict) else value
    (folder / CONFIG).write_text(json.dumps(config))


def own_embeddings(folder: Path, paths: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures, their embeddings and those of TEXTS by open_clip alone."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        pictures = torch.stack([transform(Image.open(path)) for path in paths])
        return pictures, model.eval().encode_image(pictures), model.encode_text(tokenizer(TEXTS))


@pytest.mark.parametrize(("kind", "dim", "size"), [("clip", 24, 64), ("siglip", 64, 160)])
def test_embeddings_are_open_clips_own(
    kind: str, dim: int, size: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, paths = request.getfixturevalue(kind), save_pictures(tmp_path, 5)
    pictures, images, texts = own_embeddings(folder, paths)
    encoder: Backbone = load_backbone(f"open_clip:{folder}")
    pixels, errors = encoder.load(paths)
    assert (encoder.dim, encoder.size) == (dim, size) and errors == [None] * 5
    assert isinstance(encoder, OpenClipEncoder)
    torch.testing.assert_close(encoder.normalized(pixels), pictures, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.images(pixels, batch=2), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.texts(TEXTS, batch=3), texts, rtol=0, atol=1e-5)
    assert images.std(dim=0).mean() > 0.01 and texts.std(dim=0).mean() > 0.01
    empty = encoder.images(np.zeros((0, size, size, 3), np.uint8))
    assert empty.shape == encoder.texts([]).shape == (0, dim)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_open_clips_own(folder: Path, tmp_path: Path, mode: str, interpolation: str) -> None:
    # Sizes whose margins are odd, and halve to odd and to even; smaller than the square; long ones.
    sizes = [(97, 64), (99, 64), (64, 101), (64, 103), (331, 250), (31, 20), (400, 90), (90, 1200)]
    rng, paths = np.random.default_rng(0), []
    for i, (width, height) in enumerate(sizes):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    configure(folder, preprocess_cfg={"resize_mode": mode, "interpolation": interpolation})
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    encoder = OpenClipEncoder.from_pretrained(folder)
    wanted = torch.stack([transform(Image.open(path)) for path in paths])
    torch.testing.assert_close(encoder.normalized(encoder.load(paths)[0]), wanted, rtol=0, atol=1e-6)
    plain = encoder.normalized(load_pictures(paths, encoder.size)[0])
    assert (plain - wanted).abs().max() > 0.1, "so its own way matters"


def test_what_becomes_of_awkward_pictures(siglip: Path, tmp_path: Path) -> None:
    upright = Image.open(save_pictures(tmp_path, 1)[0])
    exif = upright.getexif()
    exif[0x0112] = 6  # turned a quarter to the right when shown
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    upright.resize((3000, 1)).save(tmp_path / "needle.png")
    names = ["turned.png", "upright.png", "needle.png", "missing.png"]
    pixels, errors = OpenClipEncoder.from_pretrained(siglip).load([str(tmp_path / name) for name in names])
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() <= 3 and errors[3] is not None
    np.testing.assert_array_equal(pixels[2], upright.resize((3000, 1)).resize((160, 160), Image.Resampling.BICUBIC))


def test_half_precision_files_are_computed_in_full(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    full = OpenClipEncoder.from_pretrained(folder).images(pixels)
    save_file({name: value.half() for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    result = OpenClipEncoder.from_pretrained(folder).images(pixels)
    torch.testing.assert_close(result, full, rtol=0, atol=0.02)
    assert result.dtype == torch.float32 and not torch.equal(result, result.half().float())


def test_what_a_picture_becomes_makes_the_identity(folder: Path) -> None:
    identities = []
    for change in (
        {},
        {"quick_gelu": True},
        {"preprocess_cfg": {"resize_mode": "squash"}},
        {"preprocess_cfg": {"interpolation": "bilinear"}},
        {"preprocess_cfg": {"mean": 0.25}},
    ):
        configure(folder, **change)
        identities.append(OpenClipEncoder.from_pretrained(folder).identity())
    save_file({name: value + 1 for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    identities.append(OpenClipEncoder.from_pretrained(folder).identity())
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == len(identities)
    assert OpenClipEncoder.from_pretrained(folder).identity() == identities[-1]


def test_quietly(siglip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = OpenClipEncoder.from_pretrained(siglip)
    encoder.images(np.zeros((1, 160, 160, 3), np.uint8))
    encoder.texts(["a"])
    assert capfd.readouterr() == ("", "")


def test_a_hubs_model_from_the_cache(siglip: Path, hub: Path, one_line: OneLine) -> None:
    snapshot = cached(hub)
    shutil.copytree(siglip, snapshot)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8)
    result, direct = load_backbone(f"open_clip:hf-hub:{HUB}"), OpenClipEncoder.from_pretrained(siglip)
    assert torch.equal(result.images(pixels), direct.images(pixels)) and result.identity() == direct.identity()
    # A tokenizer that its folder lacks is that of the model it names.
    for file in snapshot.glob("tokenizer*"):
        file.unlink()
    with one_line("model someone/siglip is not on this machine .*--backbone open_clip:DIR"):
        load_backbone(f"open_clip:hf-hub:{HUB}").texts(TEXTS)
    (own := cached(hub, "someone/siglip")).mkdir(parents=True)
    save_tokenizer(own)
    assert torch.equal(load_backbone(f"open_clip:hf-hub:{HUB}").texts(TEXTS), direct.texts(TEXTS))


@pytest.fixture
def tagged(clip: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """open_clip knows tiny-vit with a tag, and the cache has its weights alone."""
    (tmp_path / "tiny-vit.json").write_text(json.dumps(CLIP_CFG))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    open_clip.add_model_config(tmp_path / "tiny-vit.json")
    tag = {"hf_hub": f"{HUB}/", "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", {"a_tag": tag})
    (snapshot := cached(hub)).mkdir(parents=True)
    shutil.copy(clip / WEIGHTS, snapshot)
    return snapshot


def test_a_model_by_its_tag(tagged: Path, clip: Path, tmp_path: Path) -> None:
    encoder = load_backbone("open_clip:tiny-vit/a-tag")
    paths = save_pictures(tmp_path, 3)
    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-vit", pretrained=str(clip / WEIGHTS), force_quick_gelu=True, image_resize_mode="squash",
        image_mean=(0.5,) * 3, image_std=(0.25,) * 3,
    )  # fmt: skip
    with torch.no_grad():
        wanted = model.eval().encode_image(torch.stack([transform(Image.open(path)) for path in paths]))
        texts = model.encode_text(open_clip.get_tokenizer("tiny-vit")(TEXTS))
    torch.testing.assert_close(encoder.images(encoder.load(paths)[0]), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.texts(TEXTS), texts, rtol=0, atol=1e-5)
    plain = OpenClipEncoder.from_pretrained(clip)  # without the tag's activation
    assert (plain.texts(TEXTS) - texts).abs().max() > 1e-3


def test_names_that_are_none(tagged: Path, one_line: OneLine, tmp_path: Path) -> None:
    with one_line("no weights 'b-tag' of tiny-vit: it has a_tag"):
        load_backbone("open_clip:tiny-vit/b-tag")
    for name in ("nowhere", "ViT-nothing/openai", str(tmp_path / "nowhere"), "local-dir:nowhere"):
        with one_line("there is no folder and no open_clip model .*open_clip:ViT-L-14/openai"):
            load_backbone(f"open_clip:{name}")
    with one_line("there is no folder not a name: name a model's folder, or a model of the hub"):
        load_backbone("open_clip:hf-hub:not a name")


def test_everything_else_is_a_clip_of_transformers(clip_folder: Path) -> None:
    assert isinstance(load_backbone(str(clip_folder)), ClipEncoder)


def test_geoclip_takes_it(geoclip_folder: Path, tmp_path: Path) -> None:
    folder = save_open_clip(tmp_path / "clip", CLIP_CFG | {"embed_dim": 768}, {"resize_mode": "squash"})
    geoclip, paths = GeoCLIP.from_pretrained(geoclip_folder, f"open_clip:{folder}"), save_pictures(tmp_path, 3)
    _, images, _ = own_embeddings(folder, paths)
    wanted = geoclip.search(geoclip.head(images), 1).lat_lon[:, 0]
    np.testing.assert_array_equal([(p.lat, p.lon) for p in geoclip(paths)], wanted)


def test_pickles_are_not_loaded_but_converted(
    folder: Path, siglip: Path, hub: Path, tmp_path: Path, one_line: OneLine, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(siglip / name, folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    wanted = OpenClipEncoder.from_pretrained(folder).images(pixels)
    tensors = load_file(folder / WEIGHTS) | {"steps": torch.tensor(3)}
    torch.save({"state_dict": tensors | {"tied": tensors["logit_scale"]}}, folder / "open_clip_pytorch_model.bin")
    torch.save({"of": "another library"}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with one_line(r"holds no open_clip_model\.safetensors.*convert open-clip .*copy --out OUT"):
        OpenClipEncoder.from_pretrained(folder)
    shutil.copytree(folder, cached(hub))
    with one_line(rf"{HUB} has no open_clip_model.*pickles.*hf download {HUB} --local-dir DIR.*convert open-clip DIR"):
        load_backbone(f"open_clip:hf-hub:{HUB}")

    def convert() -> int:
        with pytest.raises(SystemExit) as end:
            main(["convert", "open-clip", str(folder), "--out", str(tmp_path / "out")])
        return int(end.value.code or 0)

    assert convert() == 0
    out = load_file(tmp_path / "out" / WEIGHTS)
    assert out.keys() == tensors.keys() | {"tied"} and all(torch.equal(out[name], tensors[name]) for name in tensors)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    save_file({name: out[name] for name in out.keys() - {"steps", "tied"}}, tmp_path / "out" / WEIGHTS)
    assert torch.equal(OpenClipEncoder.from_pretrained(tmp_path / "out").images(pixels), wanted)

    (folder / "open_clip_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    shutil.rmtree(tmp_path / "out")
    assert convert() == 1
    assert "is refused" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_wrong_with_weights(folder: Path, one_line: OneLine) -> None:
    path, whole = folder / WEIGHTS, load_file(folder / WEIGHTS)
    picture = np.zeros((1, 64, 64, 3), np.uint8)
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    save_file({key: value for key, value in whole.items() if key != name}, path)
    with one_line(f"cannot be used as an open_clip model: its weights lack {name}"):
        OpenClipEncoder.from_pretrained(folder).images(picture)
    save_file(whole | {"visual.proj": torch.ones(5, 24)}, path)
    with one_line(r"cannot be used as an open_clip model: .*visual\.proj"):
        OpenClipEncoder.from_pretrained(folder).images(picture)
    path.write_bytes(path.read_bytes()[:1000])
    with one_line("cannot be used as an open_clip model"):
        OpenClipEncoder.from_pretrained(folder).images(picture)


def test_what_is_wrong_with_settings(folder: Path, clip_folder: Path, one_line: OneLine) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for pictures, words in (
        ({"resize_mode": "longest"}, "resized by 'longest'"),
        ({"interpolation": "nearest"}, "'nearest'"),
        ({"std": [1, 1, 0]}, "no usable mean and deviation"),
        ({"mean": "gray"}, "no usable mean and deviation"),
    ):
        (folder / CONFIG).write_text(json.dumps(config | {"preprocess_cfg": pictures}))
        with one_line(words):
            OpenClipEncoder.from_pretrained(folder)
    for model in ({"vision_cfg": {"image_size": [64, 32]}}, {"embed_dim": "24"}):
        (folder / CONFIG).write_text(json.dumps({"model_cfg": config["model_cfg"] | model}))
        with one_line("no embed_dim or no square image_size"):
            OpenClipEncoder.from_pretrained(folder)
    for broken in ([], config["model_cfg"], {"model_cfg": {"vision_cfg": {}}}, {"model_cfg": None}):
        (folder / CONFIG).write_text(json.dumps(broken))
        with one_line("describes no open_clip model"):
            OpenClipEncoder.from_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": {**config["model_cfg"], "nonsense": 1}}))
    with one_line("cannot be used as an open_clip model: .*nonsense"):
        OpenClipEncoder.from_pretrained(folder).texts(["a"])
    with one_line("clip holds no open_clip_config.json: name the folder of an open_clip model"):
        OpenClipEncoder.from_pretrained(clip_folder)


def test_what_is_wrong_with_a_tokenizer(siglip: Path, tmp_path: Path, hub: Path, one_line: OneLine) -> None:
    folder = shutil.copytree(siglip, tmp_path / "copy")
    configure(folder, text_cfg={"tokenizer_kwargs": {"trust_remote_code": True}})
    with one_line("tells its tokenizer what is not known here: 'trust_remote_code'"):
        OpenClipEncoder.from_pretrained(folder).texts(["a"])
    configure(folder, text_cfg={"tokenizer_kwargs": None})
    assert OpenClipEncoder.from_pretrained(folder).texts(["a"]).shape == (1, 64)
    (folder / "tokenizer.json").write_text("{")
    with one_line("holds no tokenizer that can be used"):
        OpenClipEncoder.from_pretrained(folder).texts(["a"])


def test_without_open_clip(clip: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with one_line(r"open_clip, which is not installed: pip install 'rag-geotoken\[open-clip\]'"):
        load_backbone(f"open_clip:{clip}")


def test_with_a_torchvision_of_another_torch(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    (tmp_path / "open_clip.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "open_clip")
    monkeypatch.syspath_prepend(tmp_path)
    with one_line(r"imported \(operator torchvision::nms does not exist\): install the torchvision .* for torch"):
        load_backbone(f"open_clip:{clip}")


class _Silent(BaseHTTPRequestHandler):
    """Takes a request, and hangs up after three seconds."""

    def do_GET(self) -> None:
        time.sleep(12)

    do_HEAD = do_GET


@pytest.mark.parametrize("name", ["someone/clip", f"open_clip:hf-hub:{HUB}"])
def test_a_hub_that_says_nothing(name: str, hub: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine) -> None:
    monkeypatch.setattr(model_folder, "ANSWER_S", 0.2)
    with serving(_Silent, monkeypatch):
        start = time.monotonic()
        with one_line("someone/[a-z]+ is not on this machine and could not be downloaded .*hf download someone/"):
            load_backbone(name)
        assert time.monotonic() - start < 8  # imports among it; the hub alone would be waited for for ten seconds


class _Hub(BaseHTTPRequestHandler):
    """Knows no model but one that wants its terms accepted."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_what_the_hub_says(hub: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine) -> None:
    with serving(_Hub, monkeypatch):
        for prefix in ("", "open_clip:hf-hub:"):
            with one_line("the hub has no model someone/nothing, or hides it: check the name"):
                load_backbone(f"{prefix}someone/nothing")
            with one_line("only to who accepted its terms"):
                load_backbone(f"{prefix}someone/gated")


def test_offline_at_once(hub: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with one_line(rf"{HUB} is not on this machine and could not be downloaded \(HF_HUB_OFFLINE is set\)"):
        load_backbone(f"open_clip:hf-hub:{HUB}")
