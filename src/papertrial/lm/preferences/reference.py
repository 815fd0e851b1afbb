"""The frozen reference of a policy: another model, a copy of its start, or itself with the adapter switched off."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from papertrial.lm.anatomy import device_of, unwrap
from papertrial.lm.generation import evaluating


def vocabulary_of(model: nn.Module) -> int:
    """How many token ids a model knows, wrapped or not."""
    return int(unwrap(model).config.get_text_config().vocab_size)


def _storages(model: nn.Module) -> dict[tuple[torch.device, int], str]:
    """Where the parameters lie in memory, with a name for each place."""
    places = {}
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and parameter.numel():
            places[parameter.device, parameter.untyped_storage().data_ptr()] = name
    return places


class Reference:
    """The model that a policy is held to, in evaluation mode and without gradients.

    Parameters
    ----------
    policy
        The model to be trained.
    ref_model
        The reference; it is used as it is and not changed, so that several policies may share it. None takes the
        policy as it is now: a peft model with its adapter switched off, of any other model a deep copy.

    Raises
    ------
    ValueError
        If ``ref_model`` is the policy, shares a parameter with it, or has another vocabulary.
    """

    def __init__(self, policy: nn.Module, ref_model: nn.Module | None = None) -> None:
        self._adapted: nn.Module | None = None
        self._own = ref_model is None
        if ref_model is None and hasattr(policy, "disable_adapter"):
            self._adapted = policy
            return
        if ref_model is None:
            ref_model = copy.deepcopy(policy).requires_grad_(False)
        mine = _storages(policy)
        for place, name in _storages(ref_model).items():
            if place in mine:
                raise ValueError(
                    f"ref_model shares the parameter {name!r} with the policy and would be trained along with it: give "
                    "a copy of its own, or None"
                )
        sizes = [vocabulary_of(model) for model in (policy, ref_model)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the policy has a vocabulary of {sizes[0]} and ref_model one of {sizes[1]}")
        self._model: nn.Module = ref_model

    def follow(self, policy: nn.Module) -> None:
        """Move a copy made here to the policy's device; a model that was given stays where its owner put it."""
        if self._own and self._adapted is None and device_of(self._model) != device_of(policy):
            self._model.to(device_of(policy))

    @property
    def adapter_off(self) -> bool:
        """Whether the reference is the policy itself without its adapter."""
        return self._adapted is not None

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference model in evaluation mode, inside a block without gradients."""
        with torch.no_grad():
            if self._adapted is None:
                with evaluating(self._model):
                    yield self._model
                return
            with evaluating(self._adapted), cast(Any, self._adapted).disable_adapter():
                yield self._adapted
