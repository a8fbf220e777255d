"""Everything that the road works with, opened once: models, index, tuning, and who compares pictures."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

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
    """Models and index of the road. ``mllm`` is a multimodal model's session, None where none is asked."""

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
        """tokens, reward: None where there are none; they are missed when asked. matcher: views from above if None."""
        index.check_encoder(alignment.identity)
        if reward is not None and tokens is not None and reward.config.d_model != tokens.config.d_model:
            width, wanted = reward.config.d_model, tokens.config.d_model
            raise GeoError(f"a reward head of width {width}, a token model of width {wanted}: train the head again")
        self.alignment, self.index, self.tuning, self.reward, self.mllm = alignment, index, tuning, reward, mllm
        self._fingerprints: dict[str, str] = {}
        self._regions: dict[tuple[object, int], Mask | None] = {}
        self._made: dict[str, Any] = {}
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
        """Open an index folder and a weights folder, and what else is named.

        Args:
            index: Made by ``rag-geotoken index build``.
            weights: The embedded Earth models unless given. Weights converted from peers may be an alignment alone.
            backbone: Where the alignment's frozen CLIP lies, if not where the weights say.
            matcher: A keypoint matcher for street photos, a folder or a hub's name.
            mllm: A multimodal model that may verify: ``http://HOST:PORT/v1``, a folder, a hub's name, ``embedded``, or
                a session.

        Raises:
            GeoError: A file is missing, broken or does not fit, or no model answers.
        """
        from rag_geotoken.mllm.session import MllmSession

        weights = Path(weights)
        alignment = GeoAlignment.from_pretrained(weights, backbone)
        has = {name: (weights / f"{name}.json").is_file() or not alignment.frozen for name in ("tokens", "tuning")}
        tokens = TokenModel.from_pretrained(weights) if has["tokens"] else None
        tuning = load_tuning(weights) if has["tuning"] else Tuning()
        reward = RewardHead.from_pretrained(weights) if (weights / "reward.json").is_file() else None
        street: Matcher | None = None
        if matcher is not None:
            from rag_geotoken.photos.keypoints import KeypointMatcher

            street = KeypointMatcher.from_pretrained(matcher)
        gallery = GeoIndex.load(index, alignment.heads)
        session = mllm if mllm is None or isinstance(mllm, MllmSession) else MllmSession.open(str(mllm))
        return cls(alignment, tokens, gallery, tuning, reward, street, session)

    def replace(self, **changes: object) -> Self:
        """The same with another ``tuning`` or ``mllm``; what was loaded is shared, the matcher too."""
        changed = copy(self)
        vars(changed).update(changes)
        return changed

    @property
    def tokens(self) -> TokenModel:
        """The token model. Raises GeoError when these weights have none."""
        return _needed(
            self._tokens,
            "these weights have no token model, so no cells can be generated: add --propose none, or put one into the "
            "same folder with rag-geotoken convert geotoken",
        )

    @property
    def session(self) -> MllmSession:
        """The multimodal model's session. Raises GeoError where none was opened."""
        return _needed(
            self.mllm, "which multimodal model? Give --mllm http://HOST:PORT/v1, a folder, a hub's name or embedded"
        )

    @property
    def reward_head(self) -> RewardHead:
        """The reward head. Raises GeoError when these weights have none."""
        return _needed(self.reward, "these weights have no reward head: train one with rag-geotoken train reward")

    def region(self, within: tuple[float, float, float] | None, at_least: int) -> Mask | None:
        """Rows of the index (rows,) that lie in a region, see :meth:`.GeoIndex.mask`; found once for all blocks."""
        key = within, at_least
        if key not in self._regions:
            self._regions = {key: self.index.mask(within, at_least=at_least)}  # one at a time: a byte a row
        return self._regions[key]

    def identity(self, name: str) -> Any:
        """What a stage's results follow from of encoder, index, tokens, reward, matcher or mllm, as JSON values."""
        if name == "encoder":
            return self.alignment.identity
        if name == "mllm":
            return [self.session.model, prompts_sha256()]
        if name in ("index", "matcher"):
            return getattr(self, name).identity
        if name not in self._fingerprints:
            models = (self.tokens,) if name == "tokens" else (self.tokens, self.reward_head)
            self._fingerprints[name] = fingerprint(*models)
        return self._fingerprints[name]

    @cached_property
    def gps_search(self) -> GpsSearch:
        """Places near the gallery, to be compared with photos' GPS embeddings."""
        return GpsSearch(self.alignment, self.index)

    def kept(self, name: str, make: Callable[[], Part]) -> Part:
        """What a verifier makes of the models once, under a name of its own."""
        if name not in self._made:
            self._made[name] = make()
        made: Part = self._made[name]
        return made

    @torch.inference_mode()
    def memory(self, embeddings: Embeddings, neighbors: Neighbors) -> Tensor:
        """Photos and their neighbors -> what the token model's decoder attends to (B, S, d_model)."""
        rows = neighbors.rows[:, : self.tokens.config.neighbors].copy()
        query, near = torch.from_numpy(embeddings.vectors), torch.from_numpy(self.index.vectors(rows))
        places = self.index.lat_lon[rows]
        cells = self.tokenizer.encode(*places.reshape(-1, 2).T).reshape(*rows.shape, -1)
        return self.tokens.memory_of(query, near, torch.from_numpy(cells), torch.from_numpy(places))

    @torch.inference_mode()
    def states(self, embeddings: Embeddings, neighbors: Neighbors, pool: Pool) -> Tensor:
        """The token model's last state (B, C, d_model) of each pool entry's cell; any cell where there is no entry."""
        lat_lon = np.where(pool.mask[..., None], pool.lat_lon, pool.lat_lon[:, :1])
        cells = torch.from_numpy(self.tokenizer.encode(*lat_lon.reshape(-1, 2).T)).view(*pool.mask.shape, -1)
        return decoding.score(self.tokens, self.memory(embeddings, neighbors), cells)[1]


def _needed(part: Part | None, missing: str) -> Part:
    if part is None:
        raise GeoError(missing)
    return part
