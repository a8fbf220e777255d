"""These functions make the embedded verifier's byte-level BPE tokenizer and the LLaVA processor around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LETTERS = "ABCDEFGHZ"
SPACE = "Ġ"  # as byte-level tokenizers write it
BEGIN, END, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
PIXELS, PATCH = 64, 16
MEAN, STD = 0.4, 0.25  # of a picture's channels, each from 0 to 1
NUMBERS = range(181)  # whole numbers that are one token each; a sign stands in the token before
# In this order: the letter before its colon; one decimal; up to three digits; punctuation and space before a number,
# with its sign; a name or phrase with what stands before it, and with the space and sign before a number.
PIECES = (
    r"[A-HZ](?=:|$)|\{|\.\d(?!\d)|\d{1,3}|[,;:]? ?-?(?=\d)|[,;:]? ?\p{L}+(?: \p{L}+)*(?: -?(?=\d))?"
    r"|\"[a-z]+\": -?|[^\s\p{L}\p{N}]+|\s+"
)
# Evidence in words is one piece with its number, such as "; place 64" or "; generated -1.2".
EVIDENCE = r"[,;] \p{Ll}+ -?\d{1,3}(?:\.\d)?(?!\d)"
HUNDRED = range(101)
# One user message: texts and pictures in the order they were given. Nothing is added to the message, so that the tokens
# of instructions and picture are the same in front of every list of candidates.
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' or part['type'] == 'image_url' %}"
    "{{ '<image>' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def make_tokenizer(corpus: Iterable[str], size: int) -> Any:
    """Train a tokenizer of about ``size`` tokens, or fewer if the texts give fewer; it depends on the texts alone.

    One token each: the letter of an option, a whole number to 180, a decimal, and the kinds of evidence that the texts
    have, with a number to 100. Characters, numbers and special tokens, 450, it has in any case.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pieces(PIECES)  # numbers by themselves, until all words are in
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[PAD, BEGIN, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(corpus)
    matches = [match for text in texts for match in re.findall(r"([,;] [a-z]+ -?)\d+(\.\d)?(?!\d)", text)]
    evidence = sorted({(words, bool(tenth)) for words, tenth in matches})
    trainer.vocab_size = max(size - len(NUMBERS) - len(HUNDRED) * len(evidence), 0)
    tokenizer.train_from_iterator((re.sub(r"\d+", "0", text) for text in texts), trainer)
    tokenizer.pre_tokenizer = _pieces(f"{EVIDENCE}|{PIECES}")
    tokenizer = Tokenizer.from_str(_with_numbers(tokenizer.to_str(), evidence))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[IMAGE],
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _pieces(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _with_numbers(tokenizer: str, evidence: list[tuple[str, bool]]) -> str:
    """Add the merges to a tokenizer's JSON that make every number one token, and every evidence with its number."""
    state = json.loads(tokenizer)
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]

    def merge(first: str, second: str) -> None:
        vocab.setdefault(first + second, len(vocab))
        merges.append([first, second])

    for text in [*map(str, NUMBERS[10:]), *(f".{digit}" for digit in range(10))]:
        for i in range(1, len(text)):  # 110 may begin as 11 or as 10, whichever comes first
            if text[:i] in vocab and text[i:] in vocab and [text[:i], text[i:]] not in merges:
                merge(text[:i], text[i:])
    for words, tenths in evidence:
        prefix = words.replace(" ", SPACE)
        if prefix in vocab:
            for n in range(10) if tenths else HUNDRED:
                merge(prefix, str(n))
                for tenth in range(10) if tenths else ():
                    merge(f"{prefix}{n}", f".{tenth}")
    return json.dumps(state)


def make_processor(tokenizer: Any) -> Any:
    """Make the processor of texts and pictures, as it is saved beside the weights."""
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )
