"""This module opens the models, the index and the tuning that the pipeline works with, once."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from rag_geotoken.decision.tuning import Tuning, load_tuning
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.geo.cells import S2Tokenizer
from rag_geotoken.index.cell_search import GpsSearch
from rag_geotoken.index.geo_index import GeoIndex, Mask
from rag_geotoken.mllm.prompts import prompts_sha256
from rag_geotoken.photos.matching import AerialMatcher, Matcher
from rag_geotoken.storage.weights import EARTH, fingerprint
from rag_geotoken.tokens import decoding
from rag_geotoken.tokens.model import TokenModel
from rag_geotoken.tokens.reward import RewardHead
from rag_geotoken.types import Embeddings, Neighbors, Pool

if TYPE_CHECKING:
    from rag_geotoken.mllm.session import MllmSession

Part = TypeVar("Part")


class Models:
    """This class holds the models and the index of the pipeline; one that is None raises GeoError when needed."""

    def __init__(
        self,
        alignment: GeoAlignment,
        tokens: TokenModel | None,
        index: GeoIndex,
        tuning: Tuning,
        reward: RewardHead | None = None,
        matcher: Matcher | None = None,
        mllm: MllmSession | None = None,
    ) -> None:
        """Check that the models fit together; without ``matcher``, pictures are compared with views from above."""
        index.check_encoder(alignment.identity)
        if reward is not None and tokens is not None and reward.config.d_model != tokens.config.d_model:
            width, wanted = reward.config.d_model, tokens.config.d_model
            raise GeoError(f"a reward head of width {width}, a token model of width {wanted}: train the head again")
        self.alignment, self.index, self.tuning, self.reward, self.mllm = alignment, index, tuning, reward, mllm
        self._regions: dict[tuple[object, int], Mask | None] = {}
        self._cache: dict[str, Any] = {}
        self._tokens, self.matcher = tokens, matcher or AerialMatcher(tuning.view_km)
        self.tokenizer = S2Tokenizer(tokens.config.level, tokens.config.group) if tokens else S2Tokenizer()

    @classmethod
    def from_pretrained(
        cls,
        index: str | Path,
        weights: str | Path = EARTH,
        backbone: str | None = None,
        matcher: str | Path | None = None,
        mllm: MllmSession | str | Path | None = None,
    ) -> Self:
        """Open an index folder and a weights folder, and a matcher and a multimodal model if named.

        Args:
            index: Made by ``rag-geotoken index build``.
            weights: The embedded Earth models unless given. Weights converted from peers may be an alignment alone.
            backbone: Path of the alignment's frozen CLIP, if not the one that the weights name.
            matcher: A keypoint matcher for street photos, a folder or a hub's name.
            mllm: A multimodal model that may verify: ``http://HOST:PORT/v1``, a folder, a hub's name, ``embedded``, or
                a session.

        Raises:
            GeoError: A file is missing, broken or does not fit, or no model answers.
        """
        from rag_geotoken.mllm.session import MllmSession

        weights = Path(weights)
        alignment = GeoAlignment.from_pretrained(weights, backbone)
        has = {name: (weights / f"{name}.json").is_file() for name in ("tokens", "tuning", "reward")}
        tokens = TokenModel.from_pretrained(weights) if has["tokens"] or not alignment.frozen else None
        tuning = load_tuning(weights) if has["tuning"] or not alignment.frozen else Tuning()
        reward = RewardHead.from_pretrained(weights) if has["reward"] else None
        keypoints: Matcher | None = None
        if matcher is not None:
            from rag_geotoken.photos.keypoints import KeypointMatcher

            keypoints = KeypointMatcher.from_pretrained(matcher)
        gallery = GeoIndex.load(index, alignment.heads)
        session = mllm if mllm is None or isinstance(mllm, MllmSession) else MllmSession.open(str(mllm))
        return cls(alignment, tokens, gallery, tuning=tuning, reward=reward, matcher=keypoints, mllm=session)

    def replace(self, **changes: object) -> Self:
        """Return a copy with another ``tuning`` or ``mllm``, which shares all that was loaded."""
        changed = copy(self)
        vars(changed).update(changes)
        return changed

    @property
    def tokens(self) -> TokenModel:
        """Return the token model, or raise GeoError when these weights have none."""
        return _needed(
            self._tokens,
            "these weights have no token model, so no cells can be generated: add --propose none, or put one into the "
            "same folder with rag-geotoken convert geotoken",
        )

    @property
    def session(self) -> MllmSession:
        """Return the multimodal model's session, or raise GeoError where none was opened."""
        return _needed(
            self.mllm, "which multimodal model? Give --mllm http://HOST:PORT/v1, a folder, a hub's name or embedded"
        )

    @property
    def reward_head(self) -> RewardHead:
        """Return the reward head, or raise GeoError when these weights have none."""
        return _needed(self.reward, "these weights have no reward head: train one with rag-geotoken train reward")

    def region(self, within: tuple[float, float, float] | None, at_least: int) -> Mask | None:
        """Return a mask (rows,) of the index rows in a region, see :meth:`.GeoIndex.mask`, computed once."""
        key = within, at_least
        if key not in self._regions:
            self._regions = {key: self.index.mask(within, at_least=at_least)}  # one at a time: it takes a byte per row
        return self._regions[key]

    def identity(self, name: str) -> Any:
        """Return the JSON values that identify the encoder, index, tokens, reward, matcher or mllm of a stage."""
        if name == "encoder":
            return self.alignment.identity
        if name == "mllm":
            return [self.session.model, prompts_sha256()]
        if name in ("index", "matcher"):
            return getattr(self, name).identity
        models = (self.tokens,) if name == "tokens" else (self.tokens, self.reward_head)
        return self.kept(f"fingerprint of {name}", lambda: fingerprint(*models))

    @cached_property
    def gps_search(self) -> GpsSearch:
        """Return the search for places near the gallery by GPS embedding."""
        return GpsSearch(self.alignment, self.index)

    def kept(self, name: str, make: Callable[[], Part]) -> Part:
        """Return what ``make`` returns, called once for each name."""
        if name not in self._cache:
            self._cache[name] = make()
        return cast(Part, self._cache[name])

    @torch.inference_mode()
    def memory(self, embeddings: Embeddings, neighbors: Neighbors) -> Tensor:
        """Encode photos and their neighbors as the memory (B, S, d_model) of the token model's decoder."""
        rows = neighbors.rows[:, : self.tokens.config.neighbors].copy()
        query, gallery = torch.from_numpy(embeddings.vectors), torch.from_numpy(self.index.vectors(rows))
        places = self.index.lat_lon[rows]
        cells = self.tokenizer.encode(*places.reshape(-1, 2).T).reshape(*rows.shape, -1)
        return self.tokens.memory(query, gallery, torch.from_numpy(cells), torch.from_numpy(places))

    @torch.inference_mode()
    def states(self, embeddings: Embeddings, neighbors: Neighbors, pool: Pool) -> Tensor:
        """Return the decoder's last state (B, C, d_model) for each pool entry's cell; any cell where it is masked."""
        lat_lon = np.where(pool.mask[..., None], pool.lat_lon, pool.lat_lon[:, :1])
        cells = torch.from_numpy(self.tokenizer.encode(*lat_lon.reshape(-1, 2).T)).view(*pool.mask.shape, -1)
        return decoding.score(self.tokens, self.memory(embeddings, neighbors), cells)[1]


def _needed(part: Part | None, missing: str) -> Part:
    if part is None:
        raise GeoError(missing)
    return part
