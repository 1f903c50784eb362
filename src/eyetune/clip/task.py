"""What image-text training learns from a batch, and how well the pairs of a split find each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from eyetune.clip.batches import trimmed
from eyetune.clip.objective import EMBEDDINGS, SCALES, contrast, gather, right_answers
from eyetune.clip.scoring import DIRECTIONS, retrieval
from eyetune.interrupt import obey, pending
from eyetune.train.task import SMALLER_FORWARD, Batch, Validation, enough_memory

if TYPE_CHECKING:
    from eyetune.clip.config import ClipTrainConfig
    from eyetune.data.pairs import PairSet
    from eyetune.runtime import Runtime

WHO = ("patient", "wording")


class ContrastTask:
    """Every image finds its text among all of the batch, and every text its image: see :mod:`eyetune.clip.objective`.

    With `train.micro_batch` a batch goes through the network in parts, and yet every pair is contrasted with every
    other: the embeddings are computed part by part without their activations, then the loss and its gradient with
    respect to the embeddings, then each part once more, to carry its share of that gradient into the network (Gao et
    al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021). Dropout draws the
    same in both passes. The gradient is that of the whole batch at once, but for rounding and for batch norms, which
    see parts.

    Args:
        train: batch sizes and metric.
        val: the split that the validation loader is of; None without one.
        names: what the training samples are called, by index.
    """

    needs_validation = ""

    def __init__(self, train: ClipTrainConfig, val: PairSet | None, names: Any) -> None:
        self.train = train
        self.val = val
        self.sample_names = names
        self.metric: str = train.metric
        self.higher_is_better = train.metric != "loss"

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the pairs of a batch, contrasted with each other; in one process, all at once."""
        found, who = _embed(network, batch), _who(batch)
        return contrast(found, found, right_answers(who, who))

    def learn(self, network: nn.Module, batch: Batch, runtime: Runtime, *, weight: float, last: bool) -> Tensor:
        """As :meth:`eyetune.train.task.InParts.learn`: against the pairs of all processes, in parts where asked."""
        size = len(batch["index"])
        counts = _counts(size, runtime)
        parts = -(-max(counts) // (self.train.micro_batch or max(counts)))
        if parts == 1:
            with runtime.accumulating(network, last):
                with runtime.autocast():
                    found = _embed(network, batch)
                loss = _among_all(found, batch, counts, runtime)
                runtime.backward(loss * weight)
            return loss.detach()
        return self._in_parts(network, _cut(batch, parts), batch, counts, runtime, weight=weight, last=last)

    def _in_parts(
        self,
        network: nn.Module,
        parts: Sequence[Batch],
        batch: Batch,
        counts: list[int],
        runtime: Runtime,
        *,
        weight: float,
        last: bool,
    ) -> Tensor:
        states, found = [], []
        for part in parts:
            states.append(_dice(runtime))
            with torch.no_grad(), runtime.autocast():
                found.append({name: value.float() for name, value in _embed(network, part).items()})
        leaves = {name: torch.cat([one[name] for one in found]) for name in EMBEDDINGS}
        leaves |= {name: found[-1][name] for name in SCALES}
        for leaf in leaves.values():
            leaf.requires_grad_()
        loss = _among_all(leaves, batch, counts, runtime)
        # The weight first: what other processes send back has theirs in it, which differ where a batch is cut short.
        gradients = dict(zip(leaves, torch.autograd.grad(loss * weight, list(leaves.values())), strict=True))
        start = 0
        for number, (part, state) in enumerate(zip(parts, states, strict=True)):
            final = number == len(parts) - 1
            end = start + len(part["index"])
            _set_dice(runtime, state)
            with runtime.accumulating(network, last and final):
                with runtime.autocast():
                    again = _embed(network, part)
                # What has this gradient with respect to the embeddings.
                shares = [(again[name].float() * gradients[name][start:end]).sum() for name in EMBEDDINGS]
                shares += [again[name].float() * gradients[name] for name in SCALES if final]
                runtime.backward(torch.stack(shares).sum())
            start = end
        return loss.detach()

    def validate(self, network: nn.Module, loader: Iterable[Batch], runtime: Runtime) -> Validation:
        """Mean loss, in batches as large as in training, and retrieval in the whole split, both ways.

        Metrics: `recall_at_1`, `_5`, `_10` and `mrr`, each the mean of both directions (which are there too, as
        `recall_at_1_image_to_text` and so on); `mean_recall`, the mean of the three recalls; `loss`.
        """
        assert self.val is not None
        found = embed_pairs(network, loader, runtime)
        loss = found.loss(self.train.batch_size * runtime.processes)
        return Validation(loss, {**summary(found.retrieval(self.val, resamples=0)), "loss": loss})

    def names(self, indices: Sequence[int]) -> list[str]:
        """Split and number of training pairs."""
        names: list[str] = self.sample_names(indices)
        return names


@dataclass(frozen=True)
class PairEmbeddings:
    """What a model makes of every pair of a split, in the order of its links.

    Args:
        values: embeddings float32[N, D] by the names of the contrasts, and the scales float32[].
        who: int64[N], `patient` and `wording` of each.
    """

    values: dict[str, Tensor]
    who: tuple[Tensor, Tensor]

    def loss(self, batch: int) -> float | None:
        """The mean loss over consecutive batches of so many pairs, the last one left out if it is only a part; over
        all pairs at once where they are fewer. None without pairs."""
        count = len(self.who[0])
        starts = range(0, max(count - batch + 1, 1), batch)
        losses = []
        for start in starts:
            rows = slice(start, min(start + batch, count))
            part = {name: value[rows] if value.ndim else value for name, value in self.values.items()}
            who = self.who[0][rows], self.who[1][rows]
            losses.append(contrast(part, part, right_answers(who, who), each=True))
        return float(torch.cat(losses).mean()) if count else None

    def retrieval(self, pairs: PairSet, *, resamples: int) -> dict[str, Any]:
        """Every patient among all texts of the split and every text among all patients (see scoring.retrieval)."""
        links = torch.tensor(pairs.links, dtype=torch.int64).reshape(-1, 2)
        images = _first_rows(self.values["image"], links[:, 0], len(pairs.patients))
        texts = _first_rows(self.values["text"], links[:, 1], len(pairs.texts))
        return retrieval(
            images,
            texts,
            pairs.links,
            patients=pairs.groups,
            words=pairs.texts,
            labels=pairs.labels,
            resamples=resamples,
        )


def summary(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The measures of both directions of a retrieval, and their means, by short names."""
    metrics: dict[str, float | None] = {}
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr"):
        values = []
        for direction in DIRECTIONS:
            entry = found[direction]["metrics"].get(name)
            # In a gallery of fewer than k everything is found.
            value = 1.0 if entry is None and found[direction]["queries"] else entry and entry["value"]
            metrics[f"{name}_{direction}"] = value
            values.append(value)
        metrics[name] = None if None in values else float(np.mean(values))
    recalls = [metrics[f"recall_at_{k}"] for k in (1, 5, 10)]
    metrics["mean_recall"] = (
        None if None in recalls else float(np.mean([value for value in recalls if value is not None]))
    )
    return metrics


def embed_pairs(network: nn.Module, loader: Iterable[Batch], runtime: Runtime) -> PairEmbeddings:
    """Run `network`, in eval mode and without gradients, over all pairs of `loader`; the same in every process.

    Raises UserError when the device has not enough memory for a batch; Interrupted, in all processes, when one of them
    has a signal pending.
    """
    network.eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in (*EMBEDDINGS, *WHO, "index")}
    scales: dict[str, Tensor] = {}
    with enough_memory(SMALLER_FORWARD), torch.no_grad():
        for batch in loader:
            with runtime.autocast():
                found = _embed(network, runtime.to_device(batch))
            for name in EMBEDDINGS:
                parts[name].append(found[name].float())
            for name in (*WHO, "index"):
                parts[name].append(batch[name])
            scales = {name: found[name].float().cpu() for name in SCALES}
            if pending() is not None:
                break
    mine = {name: torch.cat(values).cpu().numpy() for name, values in parts.items()} if scales else None
    answers = runtime.gather((mine, scales, pending() is not None))
    if any(wish for *_, wish in answers):
        raise obey("")
    shares = [share for share, *_ in answers if share is not None]
    if not shares:
        raise ValueError("the loader is empty")
    whole = {name: torch.from_numpy(np.concatenate([share[name] for share in shares])) for name in parts}
    order = torch.argsort(whole["index"])
    scales = next(found for _, found, _ in answers if found)
    who = whole["patient"][order], whole["wording"][order]
    return PairEmbeddings({name: whole[name][order] for name in EMBEDDINGS} | scales, who)


def _embed(network: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = network(batch["left"], batch["right"], trimmed(batch["ids"]), batch["single"].bool())
    return found


def _who(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["patient"], batch["wording"]


def _counts(size: int, runtime: Runtime) -> list[int]:
    """How many pairs each process has in this batch, in order of their ranks."""
    if runtime.processes == 1:
        return [size]
    counts = torch.zeros(runtime.processes, dtype=torch.int64, device=runtime.device)
    counts[runtime.rank] = size
    return [int(count) for count in runtime.sum(counts).tolist()]


def _among_all(found: Mapping[str, Tensor], batch: Batch, counts: list[int], runtime: Runtime) -> Tensor:
    """The mean loss of this process's pairs among those of all, float[]."""
    mine = _who(batch)
    if runtime.processes == 1:
        return contrast(found, found, right_answers(mine, mine))
    # One message for all of them, in float32 as the loss is.
    joined = gather(torch.cat([found[name].float() for name in EMBEDDINGS], dim=1), counts, runtime.rank)
    everyone = dict(zip(EMBEDDINGS, joined.chunk(len(EMBEDDINGS), dim=1), strict=True))
    who = gather(torch.stack(mine, dim=1), counts, runtime.rank)
    return contrast(found, everyone, right_answers(mine, (who[:, 0], who[:, 1])))


def _cut(batch: Batch, parts: int) -> list[Batch]:
    """The batch in parts of nearly the same size, as many in every process."""
    pieces = {name: value.tensor_split(parts) for name, value in batch.items()}
    return [{name: piece[number] for name, piece in pieces.items()} for number in range(parts)]


def _first_rows(values: Tensor, places: Tensor, count: int) -> Tensor:
    """float32[count, D]: for each place the first of its rows; places that no pair names stay zero."""
    rows = torch.zeros(count, values.shape[1])
    named, first = np.unique(places.numpy(), return_index=True)
    rows[torch.from_numpy(named)] = values[torch.from_numpy(first)]
    return rows


def _dice(runtime: Runtime) -> list[Tensor]:
    """The states of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    if runtime.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(runtime.device))
    elif runtime.device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def _set_dice(runtime: Runtime, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(states[1], runtime.device)
    elif runtime.device.type == "mps":
        torch.mps.set_rng_state(states[1])
