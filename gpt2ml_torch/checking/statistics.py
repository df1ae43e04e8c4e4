"""Statistics of a file's tensors that tell trained weights from damaged, misplaced or random ones.

Each bound follows from a property of every GPT2_ML, with a margin beyond the values of the shipped
model (docs/checking.md):

- A matrix is initialised with a standard deviation of 0.012 to 0.018 and trained with weight decay.
  One below 0.001 was zeroed; one above 2 can't come from that initialisation.
- The gain of a LayerNorm starts at 1 and is not decayed. A mean gain outside 0.02 to 20 belongs to
  something else, such as the LayerNorm's own bias.
- Attention depends only on products of output i of the query with output i of the key, so one can
  be scaled up and the other down without effect. Training leaves the two balanced: their norms
  correlate. So do the norms of the value's output i and of column i of the attention's output. In
  random weights, or after a forgotten transpose, the correlation is 0 within 1 / sqrt(width).
- Blocks differ from each other, and no tensor is out of proportion to its kind in other blocks.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from gpt2ml_torch.checking.finding import Finding, judge
from gpt2ml_torch.modelfile import ModelFile

SMALLEST_STD, LARGEST_STD = 1e-3, 2.0
SMALLEST_GAIN, LARGEST_GAIN = 0.02, 20.0
OUT_OF_PROPORTION = 10.0  # at most this times the median of the kind over all blocks, or 1/10 of it
LEAST_BALANCE = 0.25  # the least correlation of norms, as a mean over the blocks


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a tensor's finite values, and the number of other values."""

    mean: float
    std: float
    non_finite: int


def moments(tensor: Tensor) -> Moments:
    """The moments of a tensor, from sums over each row in float32, added up in float64.

    A few passes over the whole tensor: on a busy machine each parallel operation has to wait for
    the slowest core, so many small operations would take far longer. Non-finite values are counted
    only if a sum is not finite.
    """
    rows = tensor.reshape(-1, tensor.shape[-1]).float()
    total = rows.sum(1).double().sum().item()
    squares = _norms(rows, 1).double().square().sum().item()
    bad = 0
    if not math.isfinite(squares) or not math.isfinite(total):
        finite = rows.isfinite()
        bad = int((~finite).sum())
        good = rows[finite].double()  # squares of finite values may overflow float32
        total, squares = good.sum().item(), good.square().sum().item()
    count = max(tensor.numel() - bad, 1)
    mean = total / count
    return Moments(mean, math.sqrt(max(squares / count - mean * mean, 0.0)), bad)


def check_tensors(file: ModelFile) -> Iterator[Finding]:
    """Read every tensor once, and check checksums, non-finite values and statistics."""
    found: dict[str, Moments] = {}
    balance: dict[str, list[float]] = {"queries and keys": [], "values and outputs": []}
    damaged: list[str] = []
    values: Tensor | None = None  # the value part of a block's qkv, until its output is read
    for name in file.tensors:
        try:
            tensor = file.tensor(name)
        except ValueError as error:  # its checksum
            damaged.append(str(error).removeprefix(f"{file.path}: "))
            continue
        if tensor.is_floating_point():
            found[name] = moments(tensor)
        if file.packed is None and name.endswith("attention.qkv.weight"):
            query, key, values = tensor.chunk(3)
            together = _correlation(_norms(query, 1), _norms(key, 1))
            balance["queries and keys"].append(together)
        elif values is not None and name.endswith("attention.output.weight"):
            together = _correlation(_norms(values, 1), _norms(tensor, 0))
            balance["values and outputs"].append(together)
    yield _judge_checksums(file, damaged)
    bad = [f"{name}: {m.non_finite} NaN or infinite" for name, m in found.items() if m.non_finite]
    yield judge("finite numbers", bad, "no NaN and no infinity in any tensor")
    yield _judge_statistics(found, balance)


def _judge_checksums(file: ModelFile, damaged: list[str]) -> Finding:
    count = len(file.checksums)
    if not count:
        text = "none in the file, which version 0.1.0 wrote: convert again to get them"
        return Finding("checksums", "info", text)
    return judge("checksums", damaged, f"{count} tensors are what was written (CRC-32C)")


def _judge_statistics(found: dict[str, Moments], balance: dict[str, list[float]]) -> Finding:
    faults = [*_outside_bounds(found), *_out_of_proportion(found), *_untrained(found)]
    means = {pair: statistics.fmean(values) for pair, values in balance.items() if values}
    for pair, mean in means.items():
        if not mean >= LEAST_BALANCE:  # NaN too
            faults.append(
                f"the norms of {pair} correlate by {mean:.2f} (trained: {LEAST_BALANCE} or more): "
                "random weights, or kernels that were not transposed"
            )
    deviations = [m.std for name, m in found.items() if _is_matrix(name)]
    text = f"{len(found)} tensors are like trained ones"
    if deviations:
        text += f": standard deviations {min(deviations):.3g} to {max(deviations):.3g}"
    for pair, mean in means.items():
        text += f", norms of {pair} correlate by {mean:.2f}"
    return judge("statistics", faults, text, balance=means, kinds=_by_kind(found))


def _outside_bounds(found: dict[str, Moments]) -> Iterator[str]:
    for name, m in found.items():
        if _is_matrix(name) and not SMALLEST_STD <= m.std <= LARGEST_STD:
            yield (
                f"{name} has standard deviation {m.std:.3g}; trained: {SMALLEST_STD} to "
                f"{LARGEST_STD}"
            )
        if name.endswith("norm.weight") and not SMALLEST_GAIN <= m.mean <= LARGEST_GAIN:
            yield f"{name} has mean {m.mean:.3g}; trained: {SMALLEST_GAIN} to {LARGEST_GAIN}"


def _out_of_proportion(found: dict[str, Moments]) -> Iterator[str]:
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, m in found.items():
        if name.startswith("blocks.") and _is_matrix(name):
            kinds[_kind(name)][name] = m.std
    for members in kinds.values():
        median = statistics.median(members.values())
        for name, std in members.items():
            if not median / OUT_OF_PROPORTION <= std <= median * OUT_OF_PROPORTION:
                yield f"{name} has standard deviation {std:.3g}, its kind {median:.3g}"


def _untrained(found: dict[str, Moments]) -> Iterator[str]:
    vectors = [m for name, m in found.items() if not _is_matrix(name)]
    if vectors and all(m.std == 0 for m in vectors):
        yield "all norms and biases are constant: the weights were never trained"
    blocks: dict[str, list[Moments]] = defaultdict(list)
    for name, m in found.items():
        if name.startswith("blocks."):
            blocks[name.split(".")[1]].append(m)
    seen: dict[tuple[Moments, ...], str] = {}
    for index, content in blocks.items():
        first = seen.setdefault(tuple(content), index)
        if first != index:
            yield f"blocks {first} and {index} are the same"


def _by_kind(found: dict[str, Moments]) -> dict[str, dict[str, float]]:
    """Smallest and largest mean and standard deviation of each kind of tensor over the blocks."""
    kinds: dict[str, list[Moments]] = defaultdict(list)
    for name, m in found.items():
        kinds[_kind(name)].append(m)
    return {
        kind: {
            "smallest_std": min(m.std for m in members),
            "largest_std": max(m.std for m in members),
            "smallest_mean": min(m.mean for m in members),
            "largest_mean": max(m.mean for m in members),
        }
        for kind, members in kinds.items()
    }


def _kind(name: str) -> str:
    return ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name


def _is_matrix(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name


def _norms(matrix: Tensor, over: int) -> Tensor:
    return torch.linalg.vector_norm(matrix.float(), dim=over)


def _correlation(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack([one, other]))[0, 1].item()
