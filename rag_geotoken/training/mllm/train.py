"""Train the embedded verifier: to choose among a pool's places by their evidence, and to know the Earth by sight."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear, normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration

from rag_geotoken.decision.tuning import load_tuning
from rag_geotoken.encoders.alignment import GeoAlignment
from rag_geotoken.errors import GeoError
from rag_geotoken.options import Options
from rag_geotoken.photos.pictures import load_pictures
from rag_geotoken.photos.sources import view_source
from rag_geotoken.run.walk import RunFolder, write_photos
from rag_geotoken.storage.files import check_writable, file_sha256
from rag_geotoken.training.loop import Kept, Log, one_cycle, run_steps
from rag_geotoken.training.mllm.examples import Examples, Prompt, read_examples
from rag_geotoken.training.mllm.model import make_model, save_folder, save_weights
from rag_geotoken.training.mllm.words import MEAN, PIXELS, STD, make_processor, make_tokenizer
from rag_geotoken.training.processes import make_accelerator
from rag_geotoken.training.setup import Setup

CHECKS = 12  # looks at the held-out photos in a training, each with a checkpoint
TOGETHER = 8  # batches drawn at once and sorted by length, so that little is filled up
CORPUS = 3000  # prompts that the tokenizer is made from
SIGHT_WEIGHT, LINE_WEIGHT = 0.3, 0.5
LINE_KM = (50.0, 100.0, 200.0, 750.0)
HALFWAY = 2  # layers, after which a line's end has read its line


def train(setup: Setup) -> None:
    """Photos through the road up to the alignment's verdicts, then the training itself, into ``OUT-verifier``."""
    folder, photos, models = (
        setup.beside("verifier"),
        setup.beside("verifier-photos"),
        setup.models(load_tuning(setup.out)),
    )
    check_writable(folder)
    write_photos(photos, setup.settings["source"])
    run, options = RunFolder(photos, models), Options(verify=("alignment", "visual"))
    files = run.walk(options, until="verdicts-alignment")
    if len(run.readable) < len(run.photos):
        raise GeoError(f"{photos.name}: give pictures that can be read")
    examples = read_examples(run.tables(options, files), models.index, models.tuning)
    identity = setup.identity(photos=file_sha256(photos / "verdicts-alignment.parquet"))
    train_verifier(examples, models.alignment, folder, identity, **setup.settings, log=setup.log)


def train_verifier(
    examples: Examples,
    alignment: GeoAlignment,
    out: Path,
    identity: str,
    *,
    source: str,
    held_out: int,
    vocabulary: int,
    steps: int,
    batch: int,
    views: int,
    rate: float,
    seed: int,
    log: Log,
) -> None:
    """Train from nothing, write the folder ``out`` that transformers and vLLM load.

    Each step has ``batch`` prompts, with the cross-entropy of the answer alone, and ``views`` fresh views of the Earth,
    whose picture tokens are to tell their places apart: the contrast with the alignment's embeddings of places, which
    stand still. AdamW, one cosine cycle, bf16. ``OUT-checkpoint.safetensors`` lets a stopped training with the same
    identity go on, to the same weights. Raises GeoError when there are too few photos.
    """
    photos = len(examples.images) - held_out
    if photos < batch:
        raise GeoError(f"{len(examples.images)} photos, {held_out} of them held out, do not fill a batch of {batch}")
    accelerator = make_accelerator(cpu=True)
    torch.manual_seed(seed)
    model, processor = _begin(examples, photos, vocabulary, seed)
    save_folder(model, processor, out)
    losses = Losses(model, alignment.config.dim)
    trained = [p for p in losses.parameters() if p.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}
    others = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    adam = torch.optim.AdamW([decayed, others], lr=rate, betas=(0.9, 0.98))
    views_of, split = view_source(source)
    seen = views_of.draw_views(split, steps * views, seed).reshape(steps, views, -1)
    prompts = lru_cache(maxsize=1)(partial(draw_prompts, examples, photos, batch, seed))
    parts = np.array_split(np.arange(photos, photos + held_out), math.ceil(held_out / batch))
    looked = [Batch([examples.plain(i, np.random.default_rng(i)) for i in part], processor.tokenizer) for part in parts]

    def loss(model: nn.Module, step: int) -> Tensor:
        group, at = divmod(step, TOGETHER)
        asked = Batch(prompts(group)[at], processor.tokenizer)
        places = alignment.embed_places(seen[step, :, :2])
        answers, lines, sight = model(asked, views_of.cut(seen[step]), torch.from_numpy(places))
        total: Tensor = answers + LINE_WEIGHT * lines + SIGHT_WEIGHT * sight
        return total

    @torch.no_grad()
    def look() -> tuple[float, str]:
        losses.eval()
        found = [losses.answers(part) for part in looked]
        value = float(torch.cat([each for each, _ in found]).mean())
        right = float(torch.cat([each for _, each in found]).float().mean())
        return value, f"held-out loss {value:.4f}, {100 * right:.1f} % right"

    kept = Kept(out / "model.safetensors", out.with_name(f"{out.name}-checkpoint.safetensors"), identity)
    save = partial(save_weights, model, kept.weights)
    run_steps(accelerator, losses, one_cycle(adam, rate, steps), steps=steps, checks=CHECKS, loss=loss, check=look,
              save=save, kept=kept, log=log)  # fmt: skip


def _begin(examples: Examples, photos: int, vocabulary: int, seed: int) -> tuple[LlavaForConditionalGeneration, Any]:
    """A model with random weights and its processor, whose tokenizer is made from prompts on the first ``photos``."""
    rng = np.random.default_rng(seed)
    corpus = [examples.prompt(i, rng) for i in rng.integers(photos, size=min(CORPUS, 8 * photos))]
    processor = make_processor(make_tokenizer((said for p in corpus for said in (p.text, p.answer)), vocabulary))
    model = make_model(processor.tokenizer)
    model.set_attn_implementation("eager")  # the fast one of torch is slow for heads so narrow, on a CPU
    return model, processor


def draw_prompts(examples: Examples, photos: int, batch: int, seed: int, group: int) -> list[list[Prompt]]:
    """The prompts of ``TOGETHER`` steps, ``batch`` each, on the first ``photos``: they follow from the group's number.

    Those of a step are about equally long.
    """
    rng = np.random.default_rng([seed, group])
    drawn = rng.integers(photos, size=TOGETHER * batch)
    prompts = sorted((examples.prompt(i, rng) for i in drawn), key=lambda prompt: len(prompt.text))
    parts = [prompts[i * batch : (i + 1) * batch] for i in range(TOGETHER)]
    return [parts[i] for i in rng.permutation(TOGETHER)]


class Batch:
    """B prompts as tensors.

    tokens (B, S) int64, filled up on the right; rows, at, targets (A,) int64: the answers' tokens, each with its prompt
    and the position before it; weights (A,), which add up to one for a prompt; ends (L, 2): the prompt and position of
    each candidate's end of line, near (L, 4) whether it is within each of ``LINE_KM`` of the truth; pixels
    (P, 64, 64, 3) uint8, in order.
    """

    def __init__(self, prompts: list[Prompt], words: Any) -> None:
        before = words([prompt.text for prompt in prompts])["input_ids"]
        after = words([prompt.answer for prompt in prompts])["input_ids"]
        whole = [torch.tensor(said + answer[:-1]) for said, answer in zip(before, after, strict=True)]
        self.tokens = pad_sequence(whole, batch_first=True, padding_value=words.pad_token_id)
        counts = [len(answer) for answer in after]
        self.rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts))
        self.at = torch.cat([torch.arange(count) + len(said) - 1 for said, count in zip(before, counts, strict=True)])
        self.targets = torch.tensor([token for answer in after for token in answer])
        self.weights = torch.cat([torch.full((count,), 1 / count) for count in counts])
        # The first two lines end before the candidates.
        newline = words.encode("\n")[0]
        ends = [
            (row, end)
            for row, (said, prompt) in enumerate(zip(before, prompts, strict=True))
            for end in np.flatnonzero(np.array(said) == newline)[2 : 2 + len(prompt.away)].tolist()
        ]
        self.ends = torch.tensor(ends).view(-1, 2)
        away = torch.tensor([km for prompt in prompts for km in prompt.away])
        self.near = (away[:, None] <= torch.tensor(LINE_KM)).float()
        self.pixels, errors = load_pictures([name for prompt in prompts for name in prompt.pictures], PIXELS)
        if any(errors):
            raise GeoError(f"training needs pictures that can be read: {next(filter(None, errors))}")


class Losses(nn.Module):
    """The loss of the answers, and two that a small model learns from faster: of its lines and of its sight."""

    def __init__(self, llava: LlavaForConditionalGeneration, dim: int) -> None:
        super().__init__()
        self.llava = llava.model  # its head is its embeddings: a checkpoint keeps each tensor once
        hidden: Any = llava.get_input_embeddings().embedding_dim
        self.place, self.near = nn.Linear(hidden, dim), nn.Linear(hidden, len(LINE_KM))
        self.sharpness = nn.Parameter(torch.tensor(math.log(15.0)))

    def forward(self, batch: Batch, views: NDArray[np.uint8], places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch, views (V, 64, 64, 3), embeddings of their places (V, dim) -> three losses.

        Of the answers; of how near each candidate is, as told where its line ends; and of telling the views' places
        apart by their picture tokens.
        """
        tokens, shown = self._see(np.concatenate([batch.pixels, views])), len(batch.pixels)
        logits, lines = self._read(batch, tokens[:shown])
        asked = (cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum() / len(batch.tokens)
        near = binary_cross_entropy_with_logits(self.near(lines).float(), batch.near)
        seen = self.place(tokens[shown:].mean(dim=1))
        with torch.autocast("cpu", enabled=False):
            alike = self.sharpness.exp() * normalize(seen.float(), dim=1) @ places.T
            own = torch.arange(len(places))
            return asked, near, (cross_entropy(alike, own) + cross_entropy(alike.T, own)) / 2

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One-token answers -> their losses (B,), and whether each is the likeliest token (B,)."""
        logits, _ = self._read(batch, self._see(batch.pixels))
        return cross_entropy(logits, batch.targets, reduction="none"), logits.argmax(dim=1) == batch.targets

    def _see(self, pictures: NDArray[np.uint8]) -> Tensor:
        """(P, 64, 64, 3), made as the processor does -> (P, 16, hidden), what the language model reads of each."""
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0 - MEAN) / STD
        return torch.stack(list(self.llava.get_image_features(pixels).pooler_output))

    def _read(self, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits where answers are due (A, vocabulary) float32, and halfway states at the lines' ends (L, hidden).

        The filling on the right is behind everything that is read.
        """
        embedding = self.llava.get_input_embeddings()
        words = embedding(batch.tokens)
        shown = batch.tokens == self.llava.config.image_token_index
        words = words.masked_scatter(shown[..., None], tokens.to(words.dtype))
        states = self.llava.language_model(inputs_embeds=words, use_cache=False, output_hidden_states=True)
        logits = linear(states.last_hidden_state[batch.rows, batch.at], embedding.weight).float()
        return logits, states.hidden_states[HALFWAY][batch.ends[:, 0], batch.ends[:, 1]]
