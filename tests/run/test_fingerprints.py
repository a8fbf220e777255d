"""No stage changes its code without a new version: an old run folder must never be taken for a new one.

When this fails: raise the stage's ``version`` (in run/road.py, or the verifier's own) where results may differ, leave
it where they cannot, and either way confirm by running this file: ``python tests/test_fingerprints.py``.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

import rag_geotoken
from rag_geotoken.options import VERIFIERS, Options
from rag_geotoken.run.road import road

KNOWN = Path(__file__).parents[1] / "data" / "stage_fingerprints.json"
PACKAGE = Path(rag_geotoken.__file__).parent
MEMORY = ["models.py:memory", "tokens/model.py", "tokens/spherical.py", "encoders/dense.py", "geo/cells.py"]
POOL = ["decision/pool.py", "geo/cells.py"]
SHOWN = ["mllm/pictures.py", "mllm/prompts.py", "verifiers/questions.py", "mllm/parse.py", "verifiers/mllm.py"]
# Stage -> the code that its results follow from: a file, or FILE:FUNCTION.
SOURCES = {
    "embeddings": ["run/stages.py:embed_pictures", "run/stages.py:digests",
                   "encoders/alignment.py", "photos/pictures.py", "encoders/dense.py",
                   "encoders/earth.py", "encoders/clip.py", "encoders/open_clip.py", "encoders/shared.py"],
    "neighbors": ["run/stages.py:search", "index/geo_index.py", "index/exact.py", "index/exclusion.py",
                  "index/approximate.py"],
    "candidates": ["run/stages.py:propose", "tokens/decoding.py", "tokens/prefix_tree.py", "tokens/region.py", *MEMORY],
    "places": ["run/stages.py:find_places", "index/cell_search.py", "encoders/location.py", "geo/cells.py",
               "encoders/dense.py"],
    "posterior": ["run/stages.py:believe", "tokens/frontier.py", "tokens/prefix_tree.py", *MEMORY],
    "matches": ["run/stages.py:match", "photos/matching.py", "photos/registration.py", "photos/agreement.py",
                "photos/keypoints.py", "photos/pictures.py"],
    "verdicts-mllm-diversify": ["run/stages.py:diversify", *SHOWN],
    "pool": POOL,
    "verdicts-alignment": ["verifiers/alignment.py", "encoders/location.py", "encoders/dense.py", *POOL],
    "verdicts-look": ["verifiers/range_plus.py", "encoders/location.py", "encoders/dense.py", *POOL],
    "verdicts-reward": ["verifiers/reward.py", "tokens/reward.py", "models.py:states", "tokens/decoding.py", *MEMORY,
                        *POOL],
    "verdicts-visual": ["verifiers/visual.py", *POOL],
    "verdicts-mllm-pool": ["verifiers/shortlist.py", "verifiers/alignment.py", *SHOWN, *POOL],
    "predictions": ["run/stages.py:decide", "decision/strategies.py", "decision/confidence.py",
                    "verifiers/router.py", "verifiers/mllm.py:decide_with_mllm",
                    "tokens/posterior.py", *POOL],
}  # fmt: skip


def fingerprint(names: list[str]) -> str:
    """Sixteen hexadecimal digits over the code, without imports, comments, docstrings and layout."""
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        file, _, function = name.partition(":")
        tree: ast.AST = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        if function:
            tree = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                body[:] = [line for line in body if not isinstance(line, ast.Import | ast.ImportFrom)]
            first = body[0] if isinstance(body, list) and body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                body[0] = ast.Pass()  # type: ignore[index]
        digest.update(f"{name} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


def present() -> dict[str, dict[str, object]]:
    every = Options(verify=tuple(VERIFIERS), mllm_mode="diversify", area=True)
    return {s.name: {"version": s.version, "code": fingerprint(SOURCES[s.name])} for s in road(every)}


def test_a_stages_code_is_the_one_that_its_version_was_confirmed_for() -> None:
    known, found = json.loads(KNOWN.read_text()), present()
    changed = [name for name in found if found[name] != known.get(name)]
    assert not changed, f"the code of {', '.join(changed)} changed: see the top of {Path(__file__).name}"
    assert found.keys() == known.keys() == SOURCES.keys()


def test_words_do_not_change_a_fingerprint_and_code_does(tmp_path: Path) -> None:
    codes = ('"""One."""\n', '"""Two."""  # so\n'), ("return 1", "return (1)"), "return 2"
    file = tmp_path / "code.py"

    def of(words: str, code: str) -> str:
        file.write_text(f"{words}def f():\n    {code}\n")
        return fingerprint([str(file)])

    one, other = of(codes[0][0], codes[1][0]), of(codes[0][1], codes[1][1])
    assert one == other != of(codes[0][0], codes[2])


if __name__ == "__main__":
    KNOWN.write_text(json.dumps(present(), indent=2) + "\n")
