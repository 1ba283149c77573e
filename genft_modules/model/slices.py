"""GRFT: selection of rows or columns by their gradients, and the penalty on ΔW."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, distributed, nn

from genft_kernels import squared_gradient_sums
from genft_kernels.sharded import is_sharded
from genft_modules.files import PREFIX
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.grft import GRFTConfig, GRFTGenerator
from genft_modules.methods.weights import stored
from genft_modules.progress import bar


def _layers(model: nn.Module, adapter_name: str) -> dict[str, FusedGenLinear]:
    return {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, FusedGenLinear)
        and adapter_name in layer.genft_generators
        and isinstance(layer.genft_generators[adapter_name], GRFTGenerator)
    }


def _generators(layers: dict[str, FusedGenLinear], adapter_name: str) -> dict[str, GRFTGenerator]:
    return {name: cast(GRFTGenerator, layer.genft_generators[adapter_name]) for name, layer in layers.items()}


def needs_slices(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether the adapter is a GRFT adapter whose rows or columns are not selected yet."""
    return any(not generator.selected for generator in _generators(_layers(model, adapter_name), adapter_name).values())


# ---- selection


def select_slices(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    adapter_name: str = "default",
    progressbar: bool = True,
) -> dict[str, Tensor]:
    """Select the rows or columns that a GRFT adapter trains: for each weight, the k with the largest sum of squared
    gradients over the batches.

    The gradients are those of the base model: adapters and dropout are disabled. Weight gradients are never stored:
    each layer's output gradient and input are reduced at once (`squared_gradient_sums`), so only one vector of sums per
    layer is kept in addition to the activations.

    The gradient of a whole batch is squared, so the batch size matters, as in the paper, which does not give the size
    and number of batches. If a layer is used several times in a batch, each use counts as a separate batch. If
    torch.distributed is initialised, the sums are reduced over all ranks.

    Args:
        model: a model with the adapter, not merged, for example from `get_peft_model`.
        batches: inputs of `loss`. Tensors in a mapping are moved to the model's device.
        loss: function of (model, batch) that returns a scalar; None for `model(**batch).loss`.
        adapter_name: name of the adapter. Its V must be zero.
        progressbar: show a progress bar on stderr.

    Returns:
        The indices int64 [k], ascending, for each adapted layer by name.

    Raises:
        ValueError, TypeError: invalid arguments or gradients; the adapter is unchanged.

    Source: the criterion of GRFT (arXiv 2507.00016). If sums are equal, the smaller index wins (our choice).
    """
    layers = _layers(model, adapter_name)
    if not layers:
        raise ValueError(f"adapter_name: got {adapter_name!r}, but no layer has a GRFT adapter of that name")
    generators = _generators(layers, adapter_name)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"model: {name} has merged adapters, expected none; call unmerge_adapter() first")
        if torch.count_nonzero(generators[name].values):
            raise ValueError(f"model: V of {name} is no longer zero, expected selection before training")
    sums = {name: torch.zeros(generator.size) for name, generator in generators.items()}

    def add(name: str, x: Tensor, dy: Tensor) -> None:
        generator = generators[name]
        found = squared_gradient_sums(dy, x.to(dy.dtype), orientation=generator.orientation, backend=generator.backend)
        sums[name] = sums[name].to(found) + found

    device = next(model.parameters()).device
    total = len(batches) if isinstance(batches, Sized) else None
    with _calibrating(model, layers, add), bar(total, "selecting slices", unit="batch", show=progressbar) as progress:
        for batch in batches:
            if isinstance(batch, Mapping):
                batch = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
            value = _own_loss(model, batch) if loss is None else loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                came = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss: got {came}, expected a scalar tensor that depends on the adapted layers")
            value.backward()
            progress.update()
    if distributed.is_available() and distributed.is_initialized():
        for name, total_sum in sums.items():
            sums[name] = total_sum.to(device)
            distributed.all_reduce(sums[name])
    return _choose(generators, sums)


def _own_loss(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches: got a {type(batch).__name__}, expected mappings of model inputs, or a loss function")
    return model(**batch).loss


@contextmanager
def _calibrating(
    model: nn.Module, layers: dict[str, FusedGenLinear], add: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Context in which the model runs in eval mode without adapters, no parameter requires grad, and `add` is called
    with each layer's name, input and output gradient. The previous state is restored on exit."""

    def begin(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            # Backpropagation ends here. A copy, because the model may modify the output in place.
            output = output.detach().requires_grad_().clone()
        x = (args[0] if args else kwargs["x"]).detach()
        output.register_hook(lambda dy: add(name, x, dy))
        return output

    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    disabled: dict[Any, Any] = {layer: layer._disable_adapters for layer in layers.values()}
    handles = [layer.register_forward_hook(partial(begin, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        for layer in disabled:
            layer._disable_adapters = True
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, was in disabled.items():
            layer._disable_adapters = was
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, was in training.items():
            module.training = was


def _choose(generators: dict[str, GRFTGenerator], sums: dict[str, Tensor]) -> dict[str, Tensor]:
    if broken := [name for name, found in sums.items() if not bool(torch.isfinite(found).all())]:
        raise ValueError(f"batches: the gradients of {broken} are not finite")
    without = [name for name, found in sums.items() if not bool(found.any())]
    if len(without) == len(sums):
        raise ValueError("batches: no adapted layer got a gradient, expected at least one batch with a loss")
    if without:
        warnings.warn(
            f"{without} got no gradient; their first rows or columns are selected.", RuntimeWarning, stacklevel=3
        )
    for name, generator in generators.items():
        order = torch.argsort(sums[name], descending=True, stable=True)
        generator.select(order[: len(generator.indices)])
    return {name: generator.indices.clone() for name, generator in generators.items()}


# ---- the penalty


def grft_penalty(model: nn.Module) -> Tensor:
    """The penalty λ·Σ‖ΔW‖² (squared Frobenius norms) over the modules that match `penalty_modules` of the active GRFT
    adapters: a differentiable float32 scalar to add to the loss.

    `PenaltyMixin` adds it in a `Trainer`.

    Raises:
        ValueError: a weight is sharded; the gradient of the penalty would be summed over the ranks.

    Source: the GRFT paper (arXiv 2507.00016), whose λ is not known.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    terms = []
    for name, module in model.named_modules():
        if isinstance(module, FusedGenLinear):
            for generator in module._active_generators():
                if isinstance(generator, GRFTGenerator) and generator.penalty:
                    if is_sharded(stored(module.base_layer)):
                        raise ValueError(f"penalty: the weight of {name} is sharded, expected a penalty of 0")
                    terms.append(generator.penalty * generator.values.float().square().sum())
        elif isinstance(module, ModulesToSaveWrapper):
            for adapter in module.active_adapters:
                config = configs.get(adapter)
                if isinstance(config, GRFTConfig) and config.penalises(name.removeprefix(PREFIX)):
                    pairs = zip(
                        module.modules_to_save[adapter].parameters(), module.original_module.parameters(), strict=True
                    )
                    terms += [config.penalty * (p.float() - start.float()).square().sum() for p, start in pairs]
    device = next(model.parameters()).device
    return torch.stack([term.to(device) for term in terms]).sum() if terms else torch.zeros((), device=device)


class PenaltyMixin:
    """Adds `grft_penalty` to the training loss of a `transformers.Trainer`, once per optimizer step:

        class MyTrainer(PenaltyMixin, Trainer): ...

    The evaluation loss does not include it.
    """

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not model.training:
            return found
        loss, *outputs = found if return_outputs else (found,)
        trainer: Any = self
        penalty = grft_penalty(trainer.accelerator.unwrap_model(model))
        # With gradient accumulation, the Trainer divides the loss by the number of batches, unless it is already
        # divided by the total number of tokens.
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_tokens = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_tokens or trainer.compute_loss_func is not None
        if scaled:
            penalty = penalty / trainer.current_gradient_accumulation_steps
        loss = loss + penalty.to(loss)
        return (loss, *outputs) if return_outputs else loss
