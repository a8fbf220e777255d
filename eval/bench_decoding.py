"""How fast do we decode against a plain decode: `python eval/bench_decoding.py [--full] [--json OUT]`.

GeoToken's configuration with random weights, 32 photos of 15 neighbors, the encoder included. The plain decode is
what one writes first with PyTorch's own transformer layers, sequence first: no cache, so that at every step the whole
prefix and the memory, copied for every beam, go through all decoder layers; samples are drawn one after another. It
holds the same weights and draws with the same random numbers: exits 1 when a token differs in float32, or when beam
search on a CPU is not 8 times and sampling 20 times as fast. The floor is what the products of matrices alone would
take at the speed of one large product, the quicker of PyTorch's own and ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rag_geotoken.encoders.dense import affine
from rag_geotoken.storage.parquet import versions
from rag_geotoken.tokens import decoding
from rag_geotoken.tokens.decoding import Decoded, pick
from rag_geotoken.tokens.frontier import frontier
from rag_geotoken.tokens.model import GEOTOKEN, Block, TokenModel

WIDTH, SAMPLES, TEMPERATURE, OPENINGS = 4, 30, 0.7, 64
BARS = {"beam": 8.0, "sample": 20.0}


def build(args: argparse.Namespace) -> tuple[TokenModel, list[Tensor]]:
    """The model and its inputs: embeddings of photos (B, 3, 768), of neighbors (B, 15, 3, 768), neighbors' tokens.

    Fresh weights heed neither photo nor neighbors and give every token nearly the same chance. Sharper and louder
    attention lets the argmax differ between photos, larger output layers give chances of 1 to 2 nats; still calm enough
    that rounding is not amplified.
    """
    torch.manual_seed(args.seed)
    model = TokenModel(GEOTOKEN).eval().requires_grad_(False)
    d = GEOTOKEN.d_model
    for block in cast(list[Block], model.encoder["layers"]):
        block.self_attn.in_proj_weight[: 2 * d] *= 2
    for block in model.blocks:
        block.multihead_attn.in_proj_weight[: 2 * d] *= 3
        block.multihead_attn.out_proj.weight *= 3
    for layer in cast(list[nn.Linear], model.output_layers):
        layer.weight *= 5
    photo, near = torch.randn(args.batch, 3, GEOTOKEN.dim), torch.randn(args.batch, GEOTOKEN.neighbors, 3, GEOTOKEN.dim)
    shape = args.batch, GEOTOKEN.neighbors
    tokens = torch.stack([torch.randint(size, shape) for size in model.vocab_sizes], dim=-1)
    dtype = getattr(torch, args.dtype)
    inputs = [photo.to(args.device, dtype), near.to(args.device, dtype), tokens.to(args.device)]
    return model.to(args.device, dtype), inputs


class Plain:
    """The plain decode: PyTorch's layers with the weights of a :class:`TokenModel`, dropout off."""

    def __init__(self, model: TokenModel) -> None:
        c = model.config
        # Without encoder layers, its memory is what goes into the encoder.
        self.model = TokenModel(replace(c, encoder_layers=0))
        self.model.load_state_dict(model.state_dict(), strict=False)
        sizes = c.d_model, c.heads, c.ff, c.dropout
        with torch.device(model.positions.device):
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(*sizes), c.encoder_layers, enable_nested_tensor=False
            )
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes), c.decoder_layers)
        self.encoder.load_state_dict(model.encoder.state_dict())
        self.decoder.load_state_dict(model.decoder.state_dict())
        for module in (self.model, self.encoder, self.decoder):
            module.to(model.positions).eval()

    def memory(self, *inputs: Tensor) -> Tensor:
        """As :meth:`TokenModel.memory`, but (S, B, d_model)."""
        memory: Tensor = self.encoder(self.model.memory(*inputs).transpose(0, 1).contiguous())
        return memory

    def logits(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """Memory (S, N, d_model), the tokens so far (N, t) -> logits of the next one (N, V_t)."""
        model, (n, t) = self.model, tokens.shape
        start = model.start_token_embedding.expand(n, 1, -1)
        states = torch.cat([start, model.embedding(tokens + model.offsets[:t])], dim=1) + model.positions[: t + 1]
        mask = nn.Transformer.generate_square_subsequent_mask(t + 1, memory.device, memory.dtype)
        decoded = self.decoder(states.transpose(0, 1), memory, tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = model.output_layers[t](decoded[-1])
        return logits.float()

    @torch.inference_mode()
    def beam(self, memory: Tensor, width: int) -> Decoded:
        """Beam search with all beams of all photos in one batch, the first step with one beam a photo."""
        batch = memory.shape[1]
        tokens = torch.zeros(batch, 1, 0, dtype=torch.int64, device=memory.device)
        log_prob = torch.zeros(batch, 1, device=memory.device)
        for size in self.model.vocab_sizes:
            kept = tokens.shape[1]
            logits = self.logits(memory.repeat_interleave(kept, dim=1), tokens.flatten(0, 1))
            step = log_prob[..., None] + logits.log_softmax(-1).view(batch, kept, size)
            log_prob, flat = step.flatten(1).topk(width)
            tokens = torch.cat([pick(tokens, flat // size), flat[..., None] % size], dim=-1)
        return Decoded(tokens, log_prob)

    @torch.inference_mode()
    def sample(self, memory: Tensor, drawn: Tensor, temperature: float) -> Tensor:
        """One sample a photo from random numbers (B, T) -> tokens (B, T)."""
        tokens = torch.zeros(memory.shape[1], 0, dtype=torch.int64, device=memory.device)
        for t in range(len(self.model.vocab_sizes)):
            ladder = (self.logits(memory, tokens) / temperature).softmax(-1).cumsum(-1)
            token = (ladder <= drawn[:, t, None] * ladder[:, -1:]).sum(-1).clamp(max=ladder.shape[-1] - 1)
            tokens = torch.cat([tokens, token[:, None]], dim=-1)
        return tokens


def gigaflops(model: TokenModel, nodes: dict[str, float]) -> dict[str, float]:
    """10^9 floating-point operations a photo by phase, a multiplication and an addition each one.

    nodes: how many different prefixes of a photo our decoder must see, by way of decoding. Products of matrices alone:
    norms, softmax and the like are left out on both sides, and so is what masks or fillings waste.
    """
    c, d = model.config, model.config.d_model
    length, vocabulary = len(model.vocab_sizes), sum(model.vocab_sizes) / len(model.vocab_sizes)
    positions = 4 + c.neighbors * (3 + length)
    around, think, look = 4 * d * d, 2 * d * c.ff, 2 * d * d + 2 * positions * d
    projections = 3 * (1 + c.neighbors) * (c.dim * d + d * d)
    encoder = projections + c.encoder_layers * positions * (around + 2 * positions * d + think)
    keys = c.decoder_layers * positions * 2 * d * d

    def decoder(count: float, before: float) -> float:
        """``count`` prefixes that each look at ``before`` positions on average; one in each has an output layer."""
        return count * c.decoder_layers * (around + 2 * before * d + look + think)

    ours = {f"ours {way}": decoder(n, length / 2) + n * d * vocabulary for way, n in nodes.items()}
    # At step t the plain decode computes t + 1 positions, each looking at all of them, and the memory's keys again.
    steps = sum(decoder(t + 1, t + 1) + keys + d * vocabulary for t in range(length))
    first = decoder(1, 1) + keys + d * vocabulary
    plain = {"plain beam": WIDTH * (steps - first) + first, "plain sample": SAMPLES * steps}
    return {name: 2e-9 * n for name, n in {"encoder": encoder, "memory keys": keys, **ours, **plain}.items()}


def peak(device: str, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of one large product, by PyTorch's matmul and by our dense layers."""
    n = 8192 if device == "cuda" else 2048
    a, b, zero = (torch.randn(shape, device=device, dtype=dtype) for shape in ((n, n), (n, n), (n,)))
    ways: dict[str, Callable[[], Tensor]] = {"matmul": lambda: a @ b, "dense layer": lambda: affine(a, b, zero)}
    return {name: 2e-9 * n**3 / min(timed(device, work)[1] for _ in range(4)) for name, work in ways.items()}


def timed(device: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns and the seconds it took."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Plain and ours in turn; the record that is printed and written."""
    model, inputs = build(args)
    plain = Plain(model)
    if args.compile:
        model.memory = torch.compile(model.memory)  # type: ignore[method-assign]
    length, drawn = len(model.vocab_sizes), SAMPLES if args.full else min(SAMPLES, 3 * args.repeats)
    numbers = torch.from_numpy(decoding._uniform(range(args.batch), drawn, length, args.seed)).to(args.device)
    seconds, speeds, singles = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list), list[Tensor]()

    def run(name: str, work: Callable[[], Any]) -> Any:
        result, took = timed(args.device, work)
        seconds[name].append(took)
        return result

    def ours() -> tuple[Tensor, Decoded, Decoded]:
        memory = run("encoder", lambda: model.memory(*inputs))
        run("memory keys", lambda: [block.memory_keys(memory) for block in model.blocks])
        run("greedy", lambda: decoding.greedy(model, memory))
        run("frontier", lambda: frontier(model, memory, OPENINGS))
        beams = run("beam", lambda: decoding.beam(model, memory, WIDTH))
        settings = {"temperature": TEMPERATURE, "seed": args.seed}
        return memory, beams, run("sample", lambda: decoding.sample(model, memory, SAMPLES, **settings))

    plain.beam(plain.memory(*inputs), 1)
    ours()
    seconds.clear()  # all is warm now
    for n in range(args.repeats):
        for name, speed in peak(args.device, inputs[0].dtype).items():
            speeds[name].append(speed)
        far = run("plain encoder", lambda: plain.memory(*inputs))
        expected = run("plain beam", partial(plain.beam, far, WIDTH))
        memory, beams, samples = ours()
        for i in range(n, drawn, args.repeats):
            singles.append(run("plain sample", partial(plain.sample, far, numbers[:, i], TEMPERATURE)))
    few = samples if args.full else decoding.sample(model, memory, drawn, temperature=TEMPERATURE, seed=args.seed)
    nodes = {"greedy": length, "beam": 1 + WIDTH * (length - 1), "sample": prefixes(samples), "frontier": 1 + OPENINGS}
    different = {"beam tokens": int((beams.tokens != expected.tokens).sum())}
    different["samples"] = unmatched(few.tokens, torch.stack(singles, dim=1))
    return {
        **{name: value for name, value in vars(args).items() if name != "json"},
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("OMP_")},
        "processor": torch.backends.cpu.get_cpu_capability() if args.device == "cpu" else torch.cuda.get_device_name(),
        "different": {**different, "beam_log_prob": float((beams.log_prob - expected.log_prob).abs().max())},
        "compared": {"beams": args.batch * WIDTH, "samples": args.batch * drawn},
        "distinct_beams": len({tuple(row) for row in beams.tokens[:, 0].tolist()}),
        "prefixes_a_photo": nodes,
        **summary(seconds, speeds, gigaflops(model, nodes), args),
        "all_seconds": {name: [round(took, 4) for took in times] for name, times in seconds.items()},
        "versions": versions(),
        "command": " ".join(["python", "eval/bench_decoding.py", *sys.argv[1:]]),
    }


def prefixes(found: Decoded) -> float:
    """How many different prefixes begin the cells of a photo, whole cells left out, on average."""
    rows = found.tokens.tolist()
    return sum(len({tuple(cell[:t]) for cell in cells}) for cells in rows for t in range(len(cells[0]))) / len(rows)


def unmatched(ours: Tensor, theirs: Tensor) -> int:
    """How many of the cells (B, N, T) of one have no partner in the other, in whatever order."""
    pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
    return sum((Counter(map(tuple, a)) - Counter(map(tuple, b))).total() for a, b in pairs)


def summary(
    seconds: dict[str, list[float]], speeds: dict[str, list[float]], work: dict[str, float], args: argparse.Namespace
) -> dict[str, Any]:
    """Medians, ratios, and the floor of each phase: its operations at the peak speed."""
    took = {name: statistics.median(times) for name, times in seconds.items()}
    took["plain sample"] *= SAMPLES
    peaks = {name: statistics.median(found) for name, found in speeds.items()}
    # Our decoding is what comes after the memory's keys and values.
    phase = {name: took[name] for name in ("encoder", "memory keys", "plain beam", "plain sample")}
    phase |= {f"ours {way}": took[way] - took["memory keys"] for way in ("greedy", "beam", "sample", "frontier")}
    floor = {name: args.batch * work[name] / max(peaks.values()) for name in phase}
    total = {way: took["encoder"] + took[way] for way in ("greedy", "beam", "sample", "frontier")}
    total |= {way: took["plain encoder"] + took[way] for way in ("plain beam", "plain sample")}
    near = {way: floor["encoder"] + floor["memory keys"] + floor[f"ours {way}"] for way in ("beam", "sample")}
    return {
        "peak_gflops": {name: round(speed, 1) for name, speed in peaks.items()},
        "seconds": {name: round(value, 3) for name, value in total.items()},
        "photos_per_second": {name: round(args.batch / value, 3) for name, value in total.items()},
        "times_faster": {way: round(total[f"plain {way}"] / total[way], 2) for way in BARS},
        "floor_share": {way: round(value / total[way], 3) for way, value in near.items()},
        "phases": {
            name: {
                "gflop_a_photo": round(work[name], 3),
                "floor_seconds": round(floor[name], 4),
                "seconds": round(value, 4),
                "floor_share": round(floor[name] / value, 3),
            }
            for name, value in phase.items()
        },
        "plain_sampling": f"{len(seconds['plain sample'])} samples one after another; time: {SAMPLES} times the median",
    }


def main() -> int:
    """Print a small table, write the record, say by the exit status whether all is well."""
    parser = argparse.ArgumentParser(description="Time our decoding against a plain decode with the same tokens.")
    parser.add_argument("--batch", type=int, default=32, help="photos (default 32)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of plain and ours in turn (default 3)")
    parser.add_argument("--full", action="store_true", help="all 30 plain samples instead of three a round")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    if args.batch < 1 or args.repeats < 1:
        parser.error("--batch and --repeats must be at least 1")
    record = measure(args)
    for name, value in record["photos_per_second"].items():
        print(f"  {name:14}{value:10.3f} photos/s {record['seconds'][name]:10.3f} s")
    for name, phase in record["phases"].items():
        print("  {:14}{:9.2f} GFLOP a photo, floor {:8.3f} s, took {:8.3f} s ({:.0%})".format(name, *phase.values()))
    for way, ratio in record["times_faster"].items():
        print(f"  {way}: {ratio:.1f} times as fast as the plain decode, {record['floor_share'][way]:.0%} of the floor")
    print(f"peak {record['peak_gflops']} GFLOP/s; different: {record['different']}")
    if args.json:
        beside = args.json.with_name(args.json.name + ".part")
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, args.json)
    exact = not record["different"]["beam tokens"] + record["different"]["samples"] or args.dtype != "float32"
    fast = all(record["times_faster"][way] >= bar for way, bar in BARS.items()) or args.device != "cpu"
    return 0 if exact and fast else 1


if __name__ == "__main__":
    sys.exit(main())
