"""The road on one screen: encode, search, propose, pool, verify, decide, each a method from arrays to arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_geotoken import decoding
from rag_geotoken.alignment import GeoAlignment
from rag_geotoken.cells import S2Tokenizer
from rag_geotoken.decision import strategies as selection
from rag_geotoken.decision.pool import extend, join, keep_within, make_pool
from rag_geotoken.decision.tuning import Tuning, load_tuning
from rag_geotoken.errors import GeoError
from rag_geotoken.frontier import frontier
from rag_geotoken.gps_search import GpsSearch
from rag_geotoken.index import COPIES, GeoIndex
from rag_geotoken.lattice import Lattice
from rag_geotoken.options import Options, check_verifier
from rag_geotoken.posterior import Posterior
from rag_geotoken.reward import RewardHead
from rag_geotoken.token_model import TokenModel
from rag_geotoken.types import (
    BEAM,
    GREEDY,
    MLLM,
    SAMPLE,
    Candidates,
    Matches,
    Neighbors,
    Places,
    Pool,
    Prediction,
    Predictions,
)
from rag_geotoken.verifiers.agreement import support
from rag_geotoken.verifiers.matching import FromAbove, Matcher, match_all
from rag_geotoken.verifiers.range_plus import Look, likeness
from rag_geotoken.weights import EARTH, fingerprint


class Geolocator:
    """Models and index, loaded once; call it with pictures."""

    def __init__(
        self,
        alignment: GeoAlignment,
        tokens: TokenModel | None,
        index: GeoIndex,
        tuning: Tuning,
        reward: RewardHead | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        """tokens, reward: None where there are none; they are missed when asked. matcher: views from above if None."""
        index.check_encoder(alignment.identity)
        if reward is not None and tokens is not None and reward.config.d_model != tokens.config.d_model:
            width, wanted = reward.config.d_model, tokens.config.d_model
            raise GeoError(f"a reward head of width {width}, a token model of width {wanted}: train the head again")
        self.alignment, self.index, self.tuning, self.reward = alignment, index, tuning, reward
        self._tokens, self.matcher = tokens, matcher or FromAbove(tuning.view_km)
        self.tokenizer = S2Tokenizer(tokens.config.level, tokens.config.group) if tokens else S2Tokenizer()

    @classmethod
    def from_pretrained(
        cls,
        index: str | Path,
        weights: str | Path = EARTH,
        backbone: str | None = None,
        matcher: str | Path | None = None,
    ) -> Geolocator:
        """Open an index folder and a weights folder; ``backbone``: where the alignment's frozen CLIP lies.

        matcher: a keypoint matcher for street photos, a folder or a hub's name.

        Weights converted from peers may be an alignment alone. Raises GeoError when a file is missing, broken or does
        not fit.
        """
        weights = Path(weights)
        alignment = GeoAlignment.from_pretrained(weights, backbone)
        there = {name: (weights / f"{name}.json").is_file() or not alignment.frozen for name in ("tokens", "tuning")}
        tokens = TokenModel.from_pretrained(weights) if there["tokens"] else None
        tuning = load_tuning(weights) if there["tuning"] else Tuning()
        reward = RewardHead.from_pretrained(weights) if (weights / "reward.json").is_file() else None
        if matcher is not None:
            from rag_geotoken.verifiers.keypoints import KeypointMatcher

            street = KeypointMatcher.from_pretrained(matcher)
        gallery = GeoIndex.load(index, alignment.heads)
        return cls(alignment, tokens, gallery, tuning, reward, street if matcher is not None else None)

    @property
    def tokens(self) -> TokenModel:
        """The token model. Raises GeoError when these weights have none."""
        if self._tokens is None:
            raise GeoError(
                "these weights have no token model, so no cells can be generated: add --propose none, or put one into "
                "the same folder with rag-geotoken convert geotoken"
            )
        return self._tokens

    def __call__(self, pictures: str | Path | Sequence[str | Path], options: Options | None = None) -> list[Prediction]:
        """Pictures -> predictions in order; one that cannot be read has an error and no coordinates."""
        options = options or Options()
        references = [str(p) for p in ([pictures] if isinstance(pictures, str | Path) else pictures)]
        pixels, errors = self.alignment.load(references)
        good = [i for i, error in enumerate(errors) if error is None]
        found = [Prediction(reference, error=error) for reference, error in zip(references, errors, strict=True)]
        if good:
            decided = self.locate(pixels[good], options)
            for i, prediction in zip(good, decided.rows([references[i] for i in good]), strict=True):
                found[i] = prediction
        return found

    def locate(self, pixels: NDArray[np.uint8], options: Options) -> Predictions:
        """Pixels (B, size, size, 3) uint8 -> the decision on each: the method, start to end."""
        photo = self.encode(pixels)
        neighbors = self.search(photo, options.neighbors, digests(pixels), options.within, options.exact)
        candidates = self.propose(photo, neighbors, options) if options.propose else None
        places = self.places(photo, options.gps_places) if options.gps_places else None
        matches = self.match(pixels, neighbors) if "visual" in options.verify else None
        pool = self.pool(neighbors, candidates, places, options.within, matches)
        scores = {verifier: self.verify(verifier, photo, neighbors, pool, matches) for verifier in options.verify}
        return selection.decide(pool, scores, self.tuning)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels (B, size, size, 3) -> (B, 3, dim) image, GPS and text embedding."""
        return self.alignment.embed(pixels)

    def search(
        self,
        photo: NDArray[np.float32],
        k: int,
        own: list[str] | None = None,
        within: tuple[float, float, float] | None = None,
        exact: bool = False,
    ) -> Neighbors:
        """Embeddings (B, 3, dim) -> the k nearest gallery photos, those with a digest of ``own`` passed over.

        within: only those inside; where fewer than k are, the k nearest to that place. exact: whatever the index.
        """
        keep = self.index.mask(within, at_least=k + COPIES)
        return self.index.search(photo, k, self.tuning.search_weights, own, keep, exact=exact)

    def places(self, photo: NDArray[np.float32], n: int) -> Places:
        """The ``n`` places most like the GPS embedding of photos (B, 3, dim)."""
        return self._gps_search(photo[:, 1], n)

    @cached_property
    def _gps_search(self) -> GpsSearch:
        return GpsSearch(self.alignment, self.index.lat_lon)

    @torch.inference_mode()
    def memory(self, photo: NDArray[np.float32], neighbors: Neighbors) -> Tensor:
        """What the token model's decoder looks at, for photos (B, 3, dim) and their neighbours."""
        rows = neighbors.rows[:, : self.tokens.config.neighbors].copy()
        query, near = torch.from_numpy(photo), torch.from_numpy(self.index.vectors(rows))
        places = self.index.lat_lon[rows]
        cells = self.tokenizer.encode(*places.reshape(-1, 2).T).reshape(*rows.shape, -1)
        return self.tokens.memory_of(query, near, torch.from_numpy(cells), torch.from_numpy(places))

    @torch.inference_mode()
    def propose(
        self, photo: NDArray[np.float32], neighbors: Neighbors, options: Options, keys: list[int] | None = None
    ) -> Candidates:
        """Decode cells for photos (B, 3, dim) with their neighbours; ``keys`` name the photos' random streams."""
        memory = self.memory(photo, neighbors)
        lattice = Lattice.within(self.tokenizer, *options.within) if options.within else None
        how = (options.temperature, options.seed, keys, options.top_p, options.epsilon, lattice)
        decoded: list[tuple[int, decoding.Decoded]] = []
        for name in options.propose:
            if name == "greedy":
                decoded.append((GREEDY, decoding.greedy(self.tokens, memory, lattice)))
            elif name == "beam":
                decoded.append((BEAM, decoding.beam(self.tokens, memory, options.beam_width, lattice)))
            else:
                decoded.append((SAMPLE, decoding.sample(self.tokens, memory, options.samples, *how)))
        source = [np.full(d.log_prob.shape, name, np.int8) for name, d in decoded]
        return Candidates(
            torch.cat([d.tokens for _, d in decoded], dim=1).numpy(),
            torch.cat([d.log_prob for _, d in decoded], dim=1).numpy(),
            np.concatenate(source, axis=1),
        )

    def posterior(self, photo: NDArray[np.float32], neighbors: Neighbors, options: Options) -> Posterior:
        """What the token model believes of photos (B, 3, dim) as a whole, by frontier search."""
        return frontier(self.tokens, self.memory(photo, neighbors), options.openings)

    def match(self, pixels: NDArray[np.uint8], neighbors: Neighbors) -> Matches:
        """Pictures (B, size, size, 3), compared with their neighbours' -> where each of these puts them.

        Of a picture that cannot be read the score is 0.
        """
        return match_all(self.matcher, pixels, neighbors, self.index)

    def pool(
        self,
        neighbors: Neighbors | None,
        candidates: Candidates | None,
        places: Places | None = None,
        within: tuple[float, float, float] | None = None,
        matches: Matches | None = None,
        own: NDArray[np.float64] | None = None,
    ) -> Pool:
        """Generated and retrieved places, one entry a cell, then moved ones; those outside ``within`` left out.

        own (B, N, 2): places that a multimodal model named, NaN for none, which come last.
        """
        made = make_pool(neighbors, candidates, self.tokenizer, self.tuning, places)
        made = extend(made, matches, self.tuning) if matches else made
        if own is not None:
            made = join(made, own, np.zeros(own.shape[:2]), self.tuning.mllm_share, MLLM)
        return keep_within(made, within) if within else made

    @torch.inference_mode()
    def verify(
        self,
        verifier: str,
        photo: NDArray[np.float32],
        neighbors: Neighbors,
        pool: Pool,
        matches: Matches | None = None,
    ) -> NDArray[np.float32]:
        """A verifier's score (B, C) of each entry of the photos' pools, zero where there is none.

        alignment: G3's geo-verification, the cosine of the photo's GPS embedding with the place's. reward: GeoToken's
        head, the log of the utility it expects. look: the cosine of the photo's image embedding with what RANGE makes
        of the place. visual: how well the matches support it (:func:`.support`). Raises GeoError for another name, or a
        head that is not there.
        """
        check_verifier(verifier)
        scores = np.zeros(pool.mask.shape, np.float32)
        if verifier == "alignment":
            places = self.alignment.embed_places(pool.lat_lon[pool.mask])
            scores[pool.mask] = np.einsum("nd,nd->n", photo[np.nonzero(pool.mask)[0], 1], places)
        elif verifier == "reward" and self.reward is not None:
            states = self.states(photo, neighbors, pool)
            scores[pool.mask] = self.reward.scores(states).numpy()[pool.mask]
        elif verifier == "visual" and matches is not None:
            scores = support(pool, matches, self.tuning.visual_km)
        elif verifier == "look":
            spots, mix = pool.lat_lon[pool.mask], self.tuning
            places = self.alignment.embed_places(spots)
            looks = self.look.of(spots, places, mix.look_beta, mix.look_semantic, mix.look_spatial)
            scores[pool.mask] = likeness(photo[np.nonzero(pool.mask)[0], 0], looks)
        elif verifier == "mllm":
            raise GeoError("a multimodal model is asked by rag-geotoken locate --verify mllm --mllm WHERE")
        elif verifier == "visual":
            raise GeoError("visual verification needs matches: call match, and give its result")
        elif verifier == "reward":
            raise GeoError(f"these weights have no {verifier} head: train one with rag-geotoken train {verifier}")
        return scores

    @cached_property
    def look(self) -> Look:
        """The gallery as a bank of looks."""
        return self.index.look(self.alignment.embed_places)

    def verifier_id(self, verifier: str) -> str:
        """Which weights a verifier's scores follow from."""
        if verifier == "reward" and self.reward is not None:
            return fingerprint(self.tokens, self.reward)
        if verifier == "visual":
            return f"{self.index.manifest['sha256']} {self.matcher.identity} {self.tuning.visual_km}"
        if verifier == "look":
            mix = self.tuning.look_beta, self.tuning.look_semantic, self.tuning.look_spatial
            return f"{self.alignment.identity} {self.index.manifest['sha256']} {mix}"
        return self.alignment.identity

    @torch.inference_mode()
    def states(self, photo: NDArray[np.float32], neighbors: Neighbors, pool: Pool) -> Tensor:
        """The token model's last state (B, C, d_model) of each pool entry's cell; any cell where there is no entry."""
        lat_lon = np.where(pool.mask[..., None], pool.lat_lon, pool.lat_lon[:, :1])
        cells = torch.from_numpy(self.tokenizer.encode(*lat_lon.reshape(-1, 2).T)).view(*pool.mask.shape, -1)
        return decoding.score(self.tokens, self.memory(photo, neighbors), cells)[1]


def digests(pixels: NDArray[np.uint8]) -> list[str]:
    """A name for each picture's pixels (B, H, W, 3), 32 hexadecimal digits, by which a photo knows itself."""
    return [blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in pixels]
