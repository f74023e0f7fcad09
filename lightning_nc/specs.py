"""MODEL and DATA of the command line, such as ``package.module:name``, as a model with weights and as batches."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.data import AttributeDict
from torch import Tensor, nn

from lightning_nc.checkpoints import Checkpoint, check_sums
from lightning_nc.extras import needed
from lightning_nc.measuring.batches import listed
from lightning_nc.measuring.evaluation import MappedBatches, every_sample_once
from lightning_nc.measuring.loaders import check_loader

__all__ = ["DataSpec", "ModelSpec", "load_weights", "state_of"]

LIBRARIES = ("torchvision", "timm", "transformers")
_OF_CLI = ("_instantiator", "_class_path")
_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class ModelSpec:
    """A model that is built once, and gets the weights of one checkpoint after another.

    Args:
        text: ``package.module:name`` of a LightningModule class, which gets the hyperparameters of the checkpoint, of a
            function that returns a module, or of a module; or ``torchvision:NAME``, ``timm:NAME`` or ``transformers:NAME``. None
            for folders of transformers, which say themselves what they hold.
        given: arguments for the class or function.
        device: where the model runs.

    Raises:
        ValueError: if the text names nothing that can be a model.
    """

    def __init__(self, text: str | None, given: Mapping[str, Any], device: torch.device) -> None:
        self.text, self.given, self.device = text, dict(given), device
        self.model: Any = None
        self.arguments: dict[str, Any] = {}  # with which it was built
        self.removed: str = ""  # from the names of the weights in the last checkpoint
        self._initial: dict[str, Tensor] = {}
        self._kind, _, name = (text or "transformers:").partition(":")
        self._factory = _factory(self._kind, name) if self._kind in LIBRARIES else _imported("--model", text or "")
        if isinstance(self._factory, nn.Module) and given:
            raise ValueError(f"--model {text} is a module already; --model-args are for a class or function")
        if not callable(self._factory):
            raise ValueError(
                f"--model {text} must name a LightningModule class or a function that returns a module, got a "
                f"{type(self._factory).__name__}"
            )

    def load(self, checkpoint: Checkpoint, unsafe: bool = False) -> Any:
        """The model with the weights of a checkpoint.

        Raises:
            ValueError: for weights that do not fit, with their names.
        """
        if self._kind == "transformers" and (checkpoint.path / "config.json").is_file():
            return _pretrained(checkpoint.path, unsafe, self.given).to(self.device)
        if self.text is None:
            raise ValueError("is no folder of transformers with a config.json, so --model MODEL must say what it holds")
        weights = checkpoint.load()
        arguments = {**self._arguments(checkpoint, weights), **self.given}
        if self.model is None or not _same(arguments, self.arguments):
            self.model, self.arguments = self._build(arguments).to(self.device), arguments
            strict = getattr(self.model, "strict_loading", True)
            self._initial = {} if strict else copy.deepcopy(state_of(self.model))
        if checkpoint.is_lightning and hasattr(self.model, "on_load_checkpoint"):
            contents = {**checkpoint.contents, "state_dict": weights}
            self.model.on_load_checkpoint(contents)
            weights = contents["state_dict"]
        self.removed = load_weights(self.model, weights, self._initial)
        return self.model

    def _arguments(self, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a checkpoint says about how its model is built."""
        if self._kind in ("torchvision", "timm"):
            last = [weight for weight in weights.values() if weight.dim() > 1]
            return {"num_classes": len(last[-1])} if last else {}
        return _hyperparameters(self._factory, checkpoint.contents)

    def _build(self, arguments: Mapping[str, Any]) -> nn.Module:
        if isinstance(self._factory, nn.Module):
            return self._factory
        model = _call(f"--model {self.text}", "--model-args", self._factory, arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model {self.text} must return a torch.nn.Module, got a {type(model).__name__}")
        configure: Any = getattr(model, "configure_model", None)
        if configure is not None:
            configure()
        return model


class DataSpec:
    """Data that are loaded once.

    Args:
        text: ``package.module:name`` of a function that returns a dataloader, or of a LightningDataModule class, whose training
            data are taken.
        given: arguments for the class or function.

    Raises:
        ValueError: if the text names nothing of the kind.
    """

    def __init__(self, text: str, given: Mapping[str, Any]) -> None:
        self.text, self.given = text, dict(given)
        self.arguments: dict[str, Any] = {}  # with which they were loaded
        self._factory = _imported("--data", text)
        self._module: Any = None
        self._loader: Iterable[Any] | None = None
        if not callable(self._factory):
            raise ValueError(
                f"--data {text} must name a LightningDataModule class or a function that returns a DataLoader, got a "
                f"{type(self._factory).__name__}; wrap it in a function"
            )

    def load(self, checkpoint: Checkpoint) -> None:
        """Load the data; a LightningDataModule gets the hyperparameters that a checkpoint has of it.

        Raises:
            ValueError: if they are no batches that can be gone through several times.
        """
        self.arguments = {**_hyperparameters(self._factory, checkpoint.contents), **self.given}
        made = _call(f"--data {self.text}", "--data-args", self._factory, self.arguments)
        if hasattr(made, "train_dataloader"):
            self._module = made
            made.prepare_data()
            made.setup("fit")
            made = made.train_dataloader()
        check_loader(made)
        once = isinstance(made, Iterator)
        if not isinstance(made, Iterable) or once or (self._module and isinstance(made, list | tuple | Mapping)):
            raise ValueError(
                f"--data {self.text} must give one DataLoader, got a {type(made).__name__}"
                + ("; an iterator gives its batches once, and each checkpoint needs them" * once)
            )
        self._loader = made

    def batches(self, model: nn.Module, device: torch.device) -> Iterable[Any]:
        """The batches for a model: through its hooks of batch transfer, or those of the data module, as a Trainer calls them."""
        assert self._loader is not None
        owners = [owner for owner in (self._module, model) if hasattr(owner, _HOOKS[0])]
        if not any(_overrides(owner, name) for owner in owners for name in _HOOKS):
            return self._loader
        before, move, after = (
            getattr(next((owner for owner in owners if _overrides(owner, name)), owners[0]), name) for name in _HOOKS
        )
        loader, _ = every_sample_once(self._loader)
        return MappedBatches(loader, lambda batch: after(move(before(batch, 0), device, 0), 0))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model, also where its own ``state_dict`` leaves some out."""
    return nn.Module.state_dict(model)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> str:
    """Load weights whose names may have a prefix that the model does not know, such as ``module.`` of a distributed run.

    Args:
        model: gets the weights.
        weights: by name.
        initial: weights that the checkpoint need not have, if the model does not save all of its own.

    Returns:
        What was removed from the names; empty if nothing.

    Raises:
        ValueError: for missing or unexpected names, and for other shapes.
    """
    fitting, removed = _renamed(weights, list(state_of(model)))
    try:
        missing, unexpected = model.load_state_dict({**initial, **fitting}, strict=False)
    except RuntimeError as error:
        _, _, shapes = str(error).partition(":")
        raise ValueError(
            f"the weights do not fit the model: {' '.join(shapes.split())[:300]}; build it with other arguments, in a function "
            "or with --model-args"
        ) from error
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    loaded = {id(tensor) for name, tensor in names if name in fitting}
    tied = {name for name, tensor in names if id(tensor) in loaded}  # a file may have only one of their names
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        parts = [f"without {listed(missing)}"] * bool(missing) + [f"with {listed(unexpected)}"] * bool(unexpected)
        raise ValueError(
            f"the model, a {type(model).__name__}, needs other weights: the checkpoint comes {', and '.join(parts)}"
            + f", after removing {removed} from its names" * bool(removed)
        )
    return removed


def _renamed(weights: Mapping[str, Tensor], wanted: list[str]) -> tuple[dict[str, Tensor], str]:
    """Weights without a prefix, and without the ``_orig_mod.`` of compiled modules, if the model wants that; what was removed."""
    compiled = "_orig_mod."
    known = {name.replace(compiled, ""): name for name in wanted}
    plain = {name.replace(compiled, ""): weight for name, weight in weights.items()}
    counts: Counter[str] = Counter()
    for name in plain:
        places = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
        counts.update(name[:i] for i in places if name[i:] in known)
    prefix = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")
    if prefix.endswith("module.") and "n_averaged" not in known:
        plain.pop("n_averaged", None)  # how many models torch.optim.swa_utils.AveragedModel has averaged
    renamed = {known.get(name.removeprefix(prefix), name): weight for name, weight in plain.items()}
    if len(renamed) < len(plain):
        raise ValueError(f"without {prefix!r}, several weights have the same name")
    changed = any(compiled in name for name in weights) and not any(compiled in name for name in wanted)
    return renamed, " and ".join(map(repr, [*([compiled] * changed), *([prefix] * bool(prefix))]))


def _hyperparameters(factory: Any, contents: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class of Lightning that ``save_hyperparameters`` has put into a checkpoint."""
    if not inspect.isclass(factory) or not hasattr(factory, "CHECKPOINT_HYPER_PARAMS_KEY"):
        return {}
    kind: Any = factory
    saved = {
        name: value for name, value in contents.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {}).items() if name not in _OF_CLI
    }
    parameters = inspect.signature(kind).parameters
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    every = contents.get(kind.CHECKPOINT_HYPER_PARAMS_NAME)  # the one argument that holds them all
    if every in named:
        return {every: AttributeDict(saved)}
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in saved.items() if takes_any or name in named}


def _imported(option: str, text: str) -> Any:
    """What ``package.module:name`` names; the current directory can be imported from, as with ``python -m``."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise ValueError(f"{option} must be package.module:name, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"{option} {text}: {module} cannot be imported ({type(error).__name__}: {error}); run the command in the folder "
            "that holds it, or install it"
        ) from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        near = difflib.get_close_matches(name, dir(found), n=3) or [n for n in dir(found) if not n.startswith("_")][:10]
        raise ValueError(f"{option} {text}: {module} has no {name!r}; near: {listed(near)}") from error
    return found


def _factory(library: str, name: str) -> Callable[..., nn.Module]:
    """The function of a library that builds the model of a name, without pretrained weights."""
    if library == "transformers":
        return partial(_from_config, name)
    with needed(f"--model {library}:{name}", library):
        package = importlib.import_module("torchvision.models" if library == "torchvision" else library)
    return partial(package.get_model if library == "torchvision" else package.create_model, name)


def _from_config(name: str, **given: Any) -> nn.Module:
    with needed(f"--model transformers:{name}", '"lightning-neural-collapse[huggingface]"'):
        from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **given)
    model: nn.Module = _architecture(config)(config)
    return model


def _pretrained(path: Path, unsafe: bool, given: Mapping[str, Any]) -> nn.Module:
    """The model in a folder of transformers, of the architecture that its config names."""
    with needed(f"{path}, a folder of transformers,", '"lightning-neural-collapse[huggingface]"'):
        from transformers import AutoConfig

    for file in path.glob("pytorch_model*.bin"):
        check_sums(file)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **given)
    model: nn.Module
    model, info = _architecture(config).from_pretrained(
        path, config=config, output_loading_info=True, weights_only=not unsafe
    )
    problems = {name.removesuffix("_keys"): keys for name, keys in info.items() if keys}
    if problems:
        raise ValueError(f"the weights do not fit a {type(model).__name__}: {problems!r:.300}")
    return model


def _architecture(config: Any) -> Any:
    import transformers

    name = (getattr(config, "architectures", None) or ["none"])[0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"its config.json names the architecture {name!r}, which transformers does not have; write a function that returns "
            "the model, and pass it as --model package.module:name"
        )
    return getattr(transformers, name)


def _call(what: str, option: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{what} could not be called with the arguments {dict(arguments)!r:.200} ({error}); pass {option} "
            "NAME=VALUE, or name a function that needs none"
        ) from error


def _overrides(owner: Any, hook: str) -> bool:
    """Whether a module of Lightning has a hook of batch transfer of its own."""
    method = getattr(type(owner), hook, None)
    return method is not None and not method.__qualname__.startswith("DataHooks.")


def _same(arguments: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    try:
        return bool(arguments == others)
    except Exception:  # arrays have no single answer; another model is right in any case
        return False
