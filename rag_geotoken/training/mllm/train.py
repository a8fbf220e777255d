"""This module trains the embedded verifier to choose among a pool's places and to know the Earth by sight."""

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

CHECKS = 12  # validations in a training, each with a checkpoint
TOGETHER = 8  # batches drawn at once and sorted by length, so that little padding is needed
CORPUS = 3000  # prompts that the tokenizer is made from
SIGHT_WEIGHT, LINE_WEIGHT = 0.3, 0.5
LINE_KM = (50.0, 100.0, 200.0, 750.0)
HALFWAY = 2  # layers, after which the state at a line's end has attended to its line


def train(setup: Setup) -> None:
    """Run the pipeline on the photos up to the alignment's verdicts, then train a model into ``OUT-verifier``."""
    folder, photos = setup.beside("verifier"), setup.beside("verifier-photos")
    models = setup.models(load_tuning(setup.out))
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
    """Train a verifier from random weights into the folder ``out``, which transformers and vLLM load.

    Each step has ``batch`` prompts, with the cross-entropy of the answer alone, and ``views`` fresh views of the Earth,
    contrasted by their picture tokens with the alignment's embeddings of their places, which stay fixed. AdamW, one
    cosine cycle, bf16. ``OUT-checkpoint.safetensors`` lets a stopped training with the same identity go on, to the
    same weights. Raises GeoError when there are too few photos.
    """
    photos = len(examples.images) - held_out
    if photos < batch:
        raise GeoError(f"{len(examples.images)} photos, {held_out} of them held out, do not fill a batch of {batch}")
    accelerator = make_accelerator(cpu=True)
    torch.manual_seed(seed)
    model, processor = _make_model(examples, photos, vocabulary, seed)
    save_folder(model, processor, out)
    losses = Losses(model, alignment.config.dim)
    earth, split = view_source(source)
    drawn = earth.draw_views(split, steps * views, seed).reshape(steps, views, -1)
    prompts = lru_cache(maxsize=1)(partial(draw_prompts, examples, photos, batch, seed))
    rows = np.array_split(np.arange(photos, photos + held_out), math.ceil(held_out / batch))
    usual = [[examples.usual_prompt(i, np.random.default_rng(i)) for i in part] for part in rows]
    held_out_batches = [Batch(part, processor.tokenizer) for part in usual]

    def loss(model: nn.Module, step: int) -> Tensor:
        group, position = divmod(step, TOGETHER)
        asked = Batch(prompts(group)[position], processor.tokenizer)
        places = torch.from_numpy(alignment.embed_places(drawn[step, :, :2]))
        answer_loss, line_loss, sight_loss = model(asked, earth.cut(drawn[step]), places)
        total: Tensor = answer_loss + LINE_WEIGHT * line_loss + SIGHT_WEIGHT * sight_loss
        return total

    @torch.no_grad()
    def look() -> tuple[float, str]:
        losses.eval()
        values, right = map(torch.cat, zip(*map(losses.answers, held_out_batches), strict=True))
        value, share = float(values.mean()), float(right.float().mean())
        return value, f"held-out loss {value:.4f}, {100 * share:.1f} % right"

    kept = Kept(out / "model.safetensors", out.with_name(f"{out.name}-checkpoint.safetensors"), identity)
    save = partial(save_weights, model, kept.weights)
    schedule = one_cycle(_optimizer(losses, rate), rate, steps)
    run_steps(
        accelerator, losses, schedule, steps=steps, checks=CHECKS, loss=loss, check=look, save=save, kept=kept, log=log
    )


def _optimizer(losses: nn.Module, rate: float) -> torch.optim.AdamW:
    trained = [p for p in losses.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=rate, betas=(0.9, 0.98))


def _make_model(
    examples: Examples, photos: int, vocabulary: int, seed: int
) -> tuple[LlavaForConditionalGeneration, Any]:
    """Make a model with random weights and its processor, whose tokenizer is made from the first photos' prompts."""
    rng = np.random.default_rng(seed)
    corpus = [examples.prompt(i, rng) for i in rng.integers(photos, size=min(CORPUS, 8 * photos))]
    processor = make_processor(make_tokenizer((text for p in corpus for text in (p.text, p.answer)), vocabulary))
    model = make_model(processor.tokenizer)
    model.set_attn_implementation("eager")  # the fast one of torch is slow for heads so narrow, on a CPU
    return model, processor


def draw_prompts(examples: Examples, photos: int, batch: int, seed: int, group: int) -> list[list[Prompt]]:
    """Draw the prompts of ``TOGETHER`` steps, ``batch`` each, on the first ``photos``, from the group's number.

    Those of a step are about equally long.
    """
    rng = np.random.default_rng([seed, group])
    drawn = rng.integers(photos, size=TOGETHER * batch)
    prompts = sorted((examples.prompt(i, rng) for i in drawn), key=lambda prompt: len(prompt.text))
    return [prompts[i * batch : (i + 1) * batch] for i in rng.permutation(TOGETHER)]


class Batch:
    """This class holds B prompts as tensors.

    tokens (B, S) int64, padded on the right; rows, positions, targets (A,) int64: the answers' tokens, each with its
    prompt and the position before it; weights (A,), which add up to one for a prompt; ends (L, 2): the prompt and
    position of each candidate's end of line, near (L, 4) whether it is within each of ``LINE_KM`` of the truth; pixels
    (P, 64, 64, 3) uint8, in order.
    """

    def __init__(self, prompts: list[Prompt], tokenizer: Any) -> None:
        texts = tokenizer([prompt.text for prompt in prompts])["input_ids"]
        answers = tokenizer([prompt.answer for prompt in prompts])["input_ids"]
        whole = [torch.tensor(text + answer[:-1]) for text, answer in zip(texts, answers, strict=True)]
        self.tokens = pad_sequence(whole, batch_first=True, padding_value=tokenizer.pad_token_id)
        counts = [len(answer) for answer in answers]
        self.rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts))
        self.positions = torch.cat([torch.arange(n) + len(text) - 1 for text, n in zip(texts, counts, strict=True)])
        self.targets = torch.tensor([token for answer in answers for token in answer])
        self.weights = torch.cat([torch.full((count,), 1 / count) for count in counts])
        newline = tokenizer.encode("\n")[0]
        ends = [
            (row, end)
            for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
            # The first two lines end before the candidates.
            for end in np.flatnonzero(np.array(text) == newline)[2 : 2 + len(prompt.distances_km)].tolist()
        ]
        self.ends = torch.tensor(ends).view(-1, 2)
        distances_km = torch.tensor([km for prompt in prompts for km in prompt.distances_km])
        self.near = (distances_km[:, None] <= torch.tensor(LINE_KM)).float()
        self.pixels, errors = load_pictures([name for prompt in prompts for name in prompt.pictures], PIXELS)
        if any(errors):
            raise GeoError(f"training needs pictures that can be read: {next(filter(None, errors))}")


class Losses(nn.Module):
    """This module computes the loss of the answers, and two that a small model learns from faster.

    Those are of its lines, how near each candidate is to the truth, and of its sight, which view shows which place.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, dim: int) -> None:
        super().__init__()
        self.llava = llava.model  # its head is its embeddings: a checkpoint keeps each tensor once
        hidden: Any = llava.get_input_embeddings().embedding_dim
        self.place, self.near = nn.Linear(hidden, dim), nn.Linear(hidden, len(LINE_KM))
        self.sharpness = nn.Parameter(torch.tensor(math.log(15.0)))

    def forward(self, batch: Batch, views: NDArray[np.uint8], places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three losses of a batch, of views (V, 64, 64, 3) and of embeddings of their places (V, dim).

        They are of the answers; of how near each candidate is, read where its line ends; and of telling the views'
        places apart by their picture tokens.
        """
        pictures, shown = self._embed_pictures(np.concatenate([batch.pixels, views])), len(batch.pixels)
        logits, lines = self._run(batch, pictures[:shown])
        answer_losses = cross_entropy(logits, batch.targets, reduction="none") * batch.weights
        line_loss = binary_cross_entropy_with_logits(self.near(lines).float(), batch.near)
        sights = self.place(pictures[shown:].mean(dim=1))
        with torch.autocast("cpu", enabled=False):
            similarity = self.sharpness.exp() * normalize(sights.float(), dim=1) @ places.T
            own = torch.arange(len(places))
            sight_loss = (cross_entropy(similarity, own) + cross_entropy(similarity.T, own)) / 2
        return answer_losses.sum() / len(batch.tokens), line_loss, sight_loss

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) of one-token answers, and whether each is the likeliest token (B,)."""
        logits, _ = self._run(batch, self._embed_pictures(batch.pixels))
        return cross_entropy(logits, batch.targets, reduction="none"), logits.argmax(dim=1) == batch.targets

    def _embed_pictures(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Embed pictures (P, 64, 64, 3), prepared as the processor does, as tokens (P, 16, hidden)."""
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0 - MEAN) / STD
        return torch.stack(list(self.llava.get_image_features(pixels).pooler_output))

    def _run(self, batch: Batch, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits where answers are due (A, vocabulary) float32, and halfway states at line ends (L, hidden).

        The padding on the right comes after everything that is read.
        """
        embedding = self.llava.get_input_embeddings()
        is_picture = batch.tokens == self.llava.config.image_token_index
        inputs = embedding(batch.tokens)
        inputs = inputs.masked_scatter(is_picture[..., None], pictures.to(inputs.dtype))
        states = self.llava.language_model(inputs_embeds=inputs, use_cache=False, output_hidden_states=True)
        logits = linear(states.last_hidden_state[batch.rows, batch.positions], embedding.weight).float()
        return logits, states.hidden_states[HALFWAY][batch.ends[:, 0], batch.ends[:, 1]]
