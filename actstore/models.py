"""Load a model and its tokenizer, quietly, and say plainly what is wrong when that fails."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .capture import base_model
from .errors import ModelError, UnknownNameError

__all__ = ["load_model", "quiet"]

DTYPES = ("auto", "float32", "bfloat16", "float16")

# Where none of these is, there is no tokenizer; AutoTokenizer would make one without words.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)

EXPECTED = (
    "Give a folder with config.json and *.safetensors (what save_pretrained writes), the id of a "
    "model on the Hugging Face hub such as 'gpt2', or 'demo' for the packaged model."
)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    meta: bool = False,
    head: bool = False,
) -> tuple[torch.nn.Module, Any]:
    """Load a model, ready to run, and its tokenizer.

    Parameters
    ----------
    name : str
        A folder, a model id of the Hugging Face hub, or "demo" for the packaged model.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        "auto" is what the weights are stored in.
    device : str
        "auto" is the GPU where there is one; otherwise as torch names devices.
    revision : str, optional
        Branch, tag or commit on the hub.
    trust_remote_code : bool
        Run code that comes with the model, and read weights that are not safetensors (loading
        those can run code, too).
    meta : bool
        Do not load weights: enough to `probe` and plan.
    head : bool
        Load the head that predicts the next token, too, which `dump` needs for predictions and
        outcomes. Activations are the same with and without.

    Returns
    -------
    (Module, tokenizer or None)

    Raises
    ------
    ModelError
        The model is not there, or cannot be used.
    UnknownNameError
        An unknown element type or device.

    Examples
    --------
    >>> model, tokenizer = load_model("demo", device="cpu")
    >>> model.config.n_layer, tokenizer.decode(tokenizer("Return the value").input_ids)
    (6, 'Return the value')
    """
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    target = _device("meta" if meta else device)
    source = _source(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    with quiet():
        config = _config(name, source, options)
        if head:
            _check_causal(name, config)
        try:
            if meta:
                model = _without_weights(config, source, dtype, trust_remote_code, head)
            else:
                model = _with_weights(name, source, config, dtype, options, head)
            model = (model if head else base_model(model)).eval().to(target)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load model {name!r}: {_brief(error)} {EXPECTED}") from error
        return model, _tokenizer(name, source, options)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and progress bars of transformers within (downloads show on a terminal)."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if bars and sys.stderr.isatty():
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnknownNameError("device", name, ("auto", "cpu", "cuda", "cuda:1", "mps")) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"device {name!r}: torch {torch.__version__} sees no GPU on this machine; "
            "use 'auto' or 'cpu'"
        )
    return device


def _source(name: str) -> str:
    """The folder or the hub id that a name means."""
    if name == "demo":
        from . import demo

        return str(demo.MODEL_DIR)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise ModelError(f"model {name!r} is a file; give the folder it is in. {EXPECTED}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ModelError(f"model {name!r}: {_no_folder(folder)} {EXPECTED}")
    return name


def _no_folder(folder: Path) -> str:
    """Says that a folder is not there, and what is instead."""
    parent = folder.parent
    if not parent.is_dir():
        return f"there is no folder {str(folder)!r}, nor {str(parent)!r}."
    beside = [path.name for path in parent.iterdir() if path.is_dir()]
    near = get_close_matches(folder.name, beside, n=1)
    hint = f"; did you mean {str(parent / near[0])!r}?" if near else "."
    return f"there is no folder {str(folder)!r}{hint}"


def _config(name: str, source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.iterdir())
        found = ", ".join(inside[:10]) + (", ..." if len(inside) > 10 else "") or "nothing"
        raise ModelError(f"model {name!r}: the folder has no config.json ({found}). {EXPECTED}")
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "" if folder.is_dir() else f"{_no_folder(folder)} On the Hugging Face hub: "
        raise ModelError(f"model {name!r}: {where}{_brief(error)} {EXPECTED}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model {name!r} ({config.model_type}) is an encoder-decoder, whose two halves read "
            "different tokens; give a model that is only a decoder or only an encoder"
        )
    return config


def _check_causal(name: str, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        raise ModelError(
            f"model {name!r} ({config.model_type}) has no head that predicts the next token: "
            "leave predictions and outcomes out, or give a causal language model such as 'gpt2'"
        )


def _kind(head: bool) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if head else AutoModel


def _with_weights(
    name: str, source: str, config: Any, dtype: str, options: dict[str, Any], head: bool
) -> torch.nn.Module:
    # Other formats than safetensors are pickles, which can run code.
    safe = None if options["trust_remote_code"] else True
    model, report = _kind(head).from_pretrained(
        source,
        config=config,
        dtype=dtype,
        use_safetensors=safe,
        output_loading_info=True,
        **options,
    )
    # transformers fills what is missing with random numbers. Poolers do not matter here.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if head and missing and not any(key.startswith(prefix) for key in missing):
        raise ModelError(
            f"model {name!r}: its weights have no head (they lack {missing[0]!r}), so its "
            "predictions would be random: leave predictions and outcomes out, or give the model "
            "as it was trained"
        )
    if missing:
        raise ModelError(
            f"model {name!r}: its weights lack {len(missing)} of those that {type(model).__name__} "
            f"needs, such as {missing[0]!r}; the activations would be random. Is config.json that "
            "of these weights?"
        )
    return model


def _without_weights(
    config: Any, source: str, dtype: str, trust: bool, head: bool
) -> torch.nn.Module:
    chosen = getattr(torch, dtype) if dtype != "auto" else config.dtype or _stored_dtype(source)
    with torch.device("meta"):
        return _kind(head).from_config(config, dtype=chosen, trust_remote_code=trust)


def _stored_dtype(source: str) -> torch.dtype:
    """Element type of the weights in a folder, where the configuration does not say."""
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                kind = weights.get_slice(key).get_dtype()
                if kind in ("F32", "F16", "BF16"):
                    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    return torch.float32


def _tokenizer(name: str, source: str, options: dict[str, Any]) -> Any:
    """The tokenizer, or None where the model comes without."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    lenient = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    where = {key: value for key, value in options.items() if key == "revision"}
    if not any(cached_file(source, file, **where, **lenient) for file in TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise ModelError(f"cannot load the tokenizer of {name!r}: {_brief(error)}") from error
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def _brief(error: BaseException) -> str:
    """The first sentence of an error's text."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
