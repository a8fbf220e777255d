"""This module runs a multimodal model in this process through transformers."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rag_geotoken.errors import GeoError
from rag_geotoken.mllm.pictures import decode_picture
from rag_geotoken.mllm.request import Reply, Request, normalized_log_probs
from rag_geotoken.storage.model_folder import brief, find_model, model_identity, quiet

# Every batch has as many rows, and prompts are padded to the next multiple: sums of floats depend on the shapes. So an
# answer does not depend on the other requests, and a resumed run repeats it to the last bit.
BATCH, MULTIPLE = 16, 32
SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # one entry a token


@dataclass(frozen=True)
class _Prompt:
    position: int
    request: Request
    inputs: dict[str, Tensor]
    tokens: int
    length: int  # in tokens, padding included
    seconds: float

    @property
    def sampled(self) -> bool:
        return not self.request.options and self.request.temperature > 0


class TransformersClient:
    """This client runs an image-text-to-text model that transformers knows, from safetensors, on a GPU if there is one.

    Options are judged by the logits after the prompt, restricted to their tokens. A schema is not enforced: the model
    answers freely, and the caller parses the answer.
    """

    def __init__(self, name: str | Path) -> None:
        """Open a folder, or a model of the hub, downloaded the first time.

        Raises GeoError, in one line, when it is missing and cannot be had, or cannot be used.
        """
        folder = find_model(name)
        self.processor, self.network, self.ends = _load(folder)
        self.model = model_identity(folder)
        self.pad = next(i for i in (self.processor.tokenizer.pad_token_id, *self.ends, 0) if i is not None)
        # Some tokenizers give segments that few models take, and transformers 4 refuses what a model does not take.
        self.unused = {"token_type_ids"} - set(inspect.signature(self.network.forward).parameters)
        self.longest = getattr(self.network.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield (position, reply) a batch at a time, batches of like length together."""
        options = {option for request in requests for option in request.options}
        tokens = {option: self._token(option) for option in sorted(options)}
        waiting: dict[Any, list[_Prompt]] = defaultdict(list)
        for position, request in enumerate(requests):
            prompt = self._prompt(position, request)
            if isinstance(prompt, str):
                yield position, Reply(error=prompt)
                continue
            shapes = tuple((name, tensor.shape[1:]) for name, tensor in prompt.inputs.items() if name not in SEQUENCES)
            key = (prompt.length, not request.options and request.max_tokens, prompt.sampled, shapes)
            waiting[key].append(prompt)
            # Samples are drawn for one request at a time, since they follow from its seed.
            if len(waiting[key]) == (1 if prompt.sampled else BATCH):
                yield from self._answer(waiting.pop(key), tokens)
        for prompts in waiting.values():
            yield from self._answer(prompts, tokens)

    def _prompt(self, position: int, request: Request) -> _Prompt | str:
        """Return the tensors of one request, or what is wrong with it."""
        begun = time.perf_counter()
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in request.parts]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        try:
            pictures = [decode_picture(picture) for picture in request.pictures]
        except Exception:  # a decoder given broken bytes raises nearly anything
            return "a picture of the request is broken"
        try:
            inputs = self.processor(
                text=[text], images=[pictures] if pictures else None, add_special_tokens=False, return_tensors="pt"
            )
        except (ValueError, TypeError, RuntimeError) as error:
            return f"the model's processor refuses the request: {brief(error)}"
        tokens = inputs["input_ids"].shape[1]
        room = self.longest - request.max_tokens
        if tokens > room:
            return f"the prompt of {tokens} tokens and its answer exceed the {self.longest} that the model takes"
        length = min(-(-tokens // MULTIPLE) * MULTIPLE, room)
        inputs = {name: tensor for name, tensor in inputs.items() if name not in self.unused}
        return _Prompt(position, request, inputs, tokens, length, time.perf_counter() - begun)

    @torch.inference_mode()
    def _answer(self, prompts: list[_Prompt], tokens: dict[str, int]) -> list[tuple[int, Reply]]:
        begun, first = time.perf_counter(), prompts[0]
        rows = prompts if first.sampled else prompts + prompts[-1:] * (BATCH - len(prompts))
        try:
            output = self._generate(rows)
            if first.request.options:
                replies = self._options(prompts, output.logits[0], tokens)
            else:
                new = output.sequences[:, first.length :]
                replies = self._texts(prompts, new.view(len(rows), -1, new.shape[1]))
        except RuntimeError as error:  # out of memory among them
            return [(prompt.position, Reply(error=f"the model failed: {brief(error)}")) for prompt in prompts]
        seconds = (time.perf_counter() - begun) / len(prompts)
        return [
            (prompt.position, replace(reply, seconds=prompt.seconds + seconds))
            for prompt, reply in zip(prompts, replies, strict=True)
        ]

    def _generate(self, rows: list[_Prompt]) -> Any:
        """Generate the tokens that follow each prompt, with the logits of each step where there are options."""
        request = rows[0].request
        inputs: dict[str, Tensor] = {}
        for name in rows[0].inputs:
            tensors = [row.inputs[name] for row in rows]
            if name in SEQUENCES:
                fill = self.pad if name == "input_ids" else 0
                tensors = [torch.nn.functional.pad(t, (rows[0].length - t.shape[1], 0), value=fill) for t in tensors]
            inputs[name] = torch.cat(tensors).to(self.network.device)
        sampling: dict[str, Any] = {}
        if rows[0].sampled:
            sampling = {"temperature": request.temperature, "top_k": 0, "num_return_sequences": request.n}
        devices = [self.network.device] if self.network.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(request.seed)
            return self.network.generate(
                **inputs,
                **sampling,
                do_sample=rows[0].sampled,
                max_new_tokens=request.max_tokens,
                pad_token_id=self.pad,
                return_dict_in_generate=True,
                output_logits=bool(request.options),
            )

    def _options(self, prompts: list[_Prompt], logits: Tensor, tokens: dict[str, int]) -> list[Reply]:
        """Choose the likeliest option, or draw n, for each prompt from the logits after it (B, V)."""
        replies = []
        for prompt, row in zip(prompts, logits.double().cpu(), strict=False):
            request = prompt.request
            log_probs = normalized_log_probs(row[[tokens[option] for option in request.options]].tolist())
            if request.temperature == 0:
                texts = [request.options[log_probs.index(max(log_probs))]] * request.n
            else:
                weights = [math.exp(value / request.temperature) for value in log_probs]
                texts = random.Random(request.seed).choices(request.options, weights, k=request.n)
            replies.append(Reply(tuple(texts), log_probs, prompt_tokens=prompt.tokens, output_tokens=request.n))
        return replies

    def _texts(self, prompts: list[_Prompt], new: Tensor) -> list[Reply]:
        """Decode new tokens (B, N, T). The token that ends an answer is counted too."""
        is_end = torch.isin(new, torch.tensor(self.ends, dtype=new.dtype, device=new.device))
        counts = (is_end.cumsum(-1) - is_end.long() == 0).sum(-1).tolist()
        decode = self.processor.tokenizer.decode
        replies = []
        for prompt, rows, lengths in zip(prompts, new.tolist(), counts, strict=False):
            texts = [decode(row[:length], skip_special_tokens=True) for row, length in zip(rows, lengths, strict=True)]
            repeats = prompt.request.n // len(texts)  # without sampling, n answers are n times the one
            tokens = sum(lengths) * repeats
            replies.append(Reply(tuple(texts * repeats), prompt_tokens=prompt.tokens, output_tokens=tokens))
        return replies

    def _token(self, option: str) -> int:
        """Return the token of an option at the start of an answer. Raises GeoError where it is not exactly one."""
        tokenizer = self.processor.tokenizer
        # After a line end, since some tokenizers put a space of their own before the first word.
        tokens = tokenizer.encode("\n" + option, add_special_tokens=False)
        if tokenizer.decode(tokens[-1:]) != option:
            raise GeoError(f"{self.model} has no token of its own for the option {option!r}: ask another model")
        return int(tokens[-1])


def _load(folder: Path) -> tuple[Any, Any, list[int]]:
    """Load processor, network in evaluation mode, and the tokens that end an answer. Raises GeoError."""
    try:
        from transformers import AutoModelForImageTextToText, GenerationConfig
    except (ImportError, RuntimeError):  # from a torchvision that does not fit torch
        raise GeoError(
            "transformers cannot read pictures here: install the torchvision that fits your torch, or uninstall it"
        ) from None

    networks, configs = cast(Any, AutoModelForImageTextToText), cast(Any, GenerationConfig)
    options: Any = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            processor = _load_processor(folder, options)
            # Named here, or a folder's settings could name a hub's code instead: CVE-2026-4372 before transformers 5.3.
            network, report = networks.from_pretrained(
                folder, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True, **options
            )
    except GeoError:
        raise
    except Exception as error:  # broken files fail in many ways
        raise GeoError(f"{folder} cannot be used as a multimodal model: {brief(error)}") from None
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:  # it would be left random
        raise GeoError(f"{folder} cannot be used as a multimodal model: its weights lack {missing[0]}")
    if not getattr(processor, "chat_template", None):
        raise GeoError(f"{folder} has no chat template: name the folder of a model made to follow instructions")
    ends = network.generation_config.eos_token_id
    ends = [] if ends is None else [int(i) for i in ends] if isinstance(ends, list | tuple) else [int(ends)]
    # A folder's own settings of sampling are not what is asked for.
    network.generation_config = configs(eos_token_id=ends or None)
    network = network.eval().to("cuda") if torch.cuda.is_available() else network.float().eval()
    return processor, network, ends


def _load_processor(folder: Path, options: dict[str, Any]) -> Any:
    """Load a processor that decodes pictures by Pillow: the results do not depend on an installed torchvision."""
    import transformers

    processors: Any = transformers.AutoProcessor
    pictures: Any = transformers.AutoImageProcessor
    by_pillow = {"use_fast": False} if int(transformers.__version__.split(".")[0]) < 5 else {"backend": "pil"}
    try:
        return processors.from_pretrained(folder, **by_pillow, **options)
    except ImportError:
        pass
    try:  # models that take videos too, such as Qwen-VL, whose video part is for torchvision alone
        processor = processors.from_pretrained(folder, **options)
        processor.image_processor = pictures.from_pretrained(folder, **by_pillow, **options)
        return processor
    except ImportError:
        raise GeoError(
            f"{folder} takes videos too, and its processor needs torchvision: install the one that fits your torch, or "
            "serve the model by vLLM and give its address"
        ) from None
