"""A model's own head: its predictions of the next token, and how they come out.

Logits are made of chosen rows of the last hidden state only, and by the model's own code: what it
does after its base (a bias, a scale, a soft cap) is its own affair. `Head.check` compares that
with the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .capture import base_model, batch_inputs, unwrapped
from .errors import ModelError

__all__ = ["Head", "digest_of", "last_hidden", "predict"]

_LOGITS_NBYTES = {"cpu": 2**26, "cuda": 2**28}
_LOGITS_ROWS = {"cpu": 256, "cuda": 1024}
_LEAST_ROWS = 16
_CACHE_NBYTES = 2**21
_NEVER = -1e30  # ln of a probability of 0, where infinity times 0 would not be a number


class Head:
    """What a causal language model does after its base.

    Parameters
    ----------
    model : Module
        The model with its head.

    Attributes
    ----------
    model : Module
        The same, without what is wrapped round it.
    base : Module
        The model without its head.
    vocab_size : int
        Tokens that it predicts.

    Raises
    ------
    ModelError
        There is no head.
    """

    def __init__(self, model: nn.Module) -> None:
        self.base, self.model = base_model(model), unwrapped(model)
        embeddings = getattr(self.model, "get_output_embeddings", lambda: None)()
        if self.base is self.model or embeddings is None:
            raise _without(self.model)
        self._name = str(self.model.base_model_prefix)
        if self.model._modules.get(self._name) is not self.base:
            raise _strange(self.model, f"its base is not at {self._name!r}")
        self.vocab_size = int(embeddings.weight.shape[0])

    def logits(self, rows: Tensor) -> Tensor:
        """Logits (row, vocab), in float32.

        Parameters
        ----------
        rows : Tensor (row, width)
            Of the last hidden state, as the base gives it.
        """
        ids = torch.zeros((1, len(rows)), dtype=torch.int64, device=rows.device)
        # In the base's place, so that the model's own code goes on with these rows.
        self.model._modules[self._name] = _Instead(self.base, rows[None])
        try:
            return _logits(self.model, {"input_ids": ids})
        finally:
            self.model._modules[self._name] = self.base

    def rows_at_once(self, device: torch.device) -> int:
        """Rows whose logits fit in memory; the same for every batch, since it decides the bits."""
        kind = "cpu" if device.type == "cpu" else "cuda"
        fitting = _LOGITS_NBYTES[kind] // (4 * self.vocab_size)
        return max(_LEAST_ROWS, min(fitting, _LOGITS_ROWS[kind]))

    def check(self) -> None:
        """Make sure that logits are the whole model's, and that it predicts what it has not seen.

        Raises
        ------
        ModelError
            A head of an unknown kind, or a model that reads the tokens that it would predict.
        """
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.inference_mode():
                inputs = batch_inputs(self.model, [np.array([0, 1])])
                whole = _logits(self.model, inputs)
                ours = self.logits(last_hidden(self.base(**inputs))[0])
                other = batch_inputs(self.model, [np.array([0, self.vocab_size - 1])])
                changed = _logits(self.model, other)
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise _strange(self.model, f"{type(error).__name__}: {error}") from error
        finally:
            for module in training:
                module.training = True
        exact = next(self.base.parameters()).dtype.itemsize >= 4
        slack = 1e-4 if exact else 0.05
        apart = float((ours - whole).abs().max())
        if not apart <= slack * float(whole.abs().max()):
            raise _strange(self.model, f"logits come out {apart:.2g} from the model's own")
        first, second = (changed - whole).abs().amax(1).tolist()
        if not first <= slack * second:
            raise ModelError(
                f"{type(self.model).__name__} reads the tokens behind a position, too, so what it "
                "says there is no prediction of the next one. Leave predictions and outcomes out, "
                "or give a causal language model"
            )


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of a batch of one sequence, (token, vocab)."""
    output = model(**inputs)
    logits = output.get("logits") if isinstance(output, Mapping) else output[0]
    expected = inputs["input_ids"].shape
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != expected:
        raise _strange(model, "it gives no logits for each token")
    return logits[0].float()


def last_hidden(output: Any) -> Tensor:
    """The last hidden state (batch, sequence, width) in what a base gives."""
    return output["last_hidden_state"] if isinstance(output, Mapping) else output[0]


def _without(model: nn.Module) -> ModelError:
    return ModelError(
        "predictions and outcomes need a causal language model with its head, and "
        f"{type(model).__name__} has none: load it by actstore.load_model(NAME, head=True) or "
        "transformers.AutoModelForCausalLM, or leave predictions and outcomes out"
    )


def _strange(model: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"the head of {type(model).__name__} is not understood ({what}): leave predictions and "
        "outcomes out, or put your own by actstore.Writer.put_tables"
    )


class _Instead(nn.Module):
    """Stands where the base does, and gives rows that are there already."""

    def __init__(self, base: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self._base = [base]  # in a list, so that it is no part of this module
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        if name == "decoder":  # OPT's head calls this part of its base
            return self
        return getattr(self._base[0], name)

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return _Rows(last_hidden_state=self._rows)


class _Rows(BaseModelOutputWithPastAndCrossAttentions):
    """What a base gives; whatever else a head passes on of it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def digest_of(head: Head) -> str | None:
    """sha256 over the weights that the model has beside its base's; None on the meta device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(head.model.state_dict().items()):
        if name.startswith(f"{head.model.base_model_prefix}."):
            continue
        if tensor.device.type == "meta":
            return None
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {crc32c(raw)}\n".encode())
    return digest.hexdigest()


# -- from logits to tables -----------------------------------------------------------------


def predict(head: Head, rows: Tensor, following: Tensor, ranks: int, outcomes: bool) -> Tensor:
    """Predictions and outcomes from rows of the last hidden state.

    Parameters
    ----------
    head : Head
    rows : Tensor (row, width)
    following : Tensor of int64 (row,)
        The true next token; -1 for none.
    ranks : int
        How many of the likeliest next tokens to keep.
    outcomes : bool
        Whether to add loss, entropy and rank.

    Returns
    -------
    Tensor of int32 (row, column)
        The columns of `tables.split`, on the device of `rows`.
    """
    step = head.rows_at_once(rows.device)
    # The product with the head's weights wants many rows; what follows runs in the cache.
    few = max(1, _CACHE_NBYTES // (4 * head.vocab_size)) if rows.device.type == "cpu" else step
    parts = []
    for own, after in zip(rows.split(step), following.split(step), strict=True):
        for logits, true in zip(head.logits(own).split(few), after.split(few), strict=True):
            log_p = torch.log_softmax(logits, 1)
            columns = _predictions(logits, log_p, ranks) if ranks else []
            if outcomes:
                columns += _outcomes(logits, log_p, true[:, None])
            parts.append(torch.cat([c.view(torch.int32) for c in columns], 1))
    return torch.cat(parts)


def _predictions(logits: Tensor, log_p: Tensor, ranks: int) -> list[Tensor]:
    ids = _likeliest(logits, ranks)
    return [ids.int(), log_p.gather(1, ids).exp()]


def _likeliest(logits: Tensor, ranks: int) -> Tensor:
    """Ids of the largest logits, best first; the lower id where two are equal.

    16-bit models give many equal logits, of which `topk` takes any.
    """
    values, ids = logits.topk(ranks)
    least = values[:, -1:]
    listed, equal = values == least, logits == least
    cut = (equal.sum(1) > listed.sum(1)).nonzero()[:, 0]
    if len(cut):
        among = equal[cut]
        nth = among.cumsum(1, dtype=torch.int32)
        kept = among & (nth <= listed[cut].sum(1, keepdim=True))
        ids[cut] = ids[cut].masked_scatter(listed[cut], kept.nonzero()[:, 1])
    ids, order = ids.sort(1)
    again = values.gather(1, order).argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, again)


def _outcomes(logits: Tensor, log_p: Tensor, following: Tensor) -> list[Tensor]:
    none = following < 0
    true = following.clamp(min=0)
    loss = -log_p.gather(1, true)
    entropy = -log_p.exp().mul_(log_p.clamp_(min=_NEVER)).sum(1, keepdim=True)  # log_p is done with
    own = logits.gather(1, true)
    rank = (logits > own).sum(1, keepdim=True, dtype=torch.int32)
    equal = logits == own
    tied = (equal.sum(1) > 1).nonzero()[:, 0]
    if len(tied):
        number = torch.arange(logits.shape[1], device=logits.device)
        before = equal[tied] & (number < true[tied])
        rank[tied] += before.sum(1, keepdim=True, dtype=torch.int32)
    return [loss.masked_fill(none, torch.nan), entropy, rank.masked_fill(none, -1)]
