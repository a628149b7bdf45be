"""What is compared: one way to run a model, such as a sharing plan or another method's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from depthkv.compress.recipe import CacheRecipe
from depthkv.plan import SharingPlan
from depthkv.sharing import share

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

__all__ = ["Arm", "plan_arms"]

MakeCache = Callable[["PreTrainedConfig"], "Cache"]
"""From a model's config to an empty cache for it."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run a model. Every suite of `depthkv.evaluate` measures one under `applied`."""

    label: str
    """Names it in tables and pictures; of several arms in one run each has another."""
    plan: SharingPlan | None = None
    """Shared meanwhile; None leaves every layer its own cache."""
    recipe: CacheRecipe | None = None
    """The same with a recipe, in the place of `plan`."""
    patch: Callable[[nn.Module], AbstractContextManager[object]] | None = None
    """Holds meanwhile, inside the sharing: what another method changes in the model."""
    make_cache: MakeCache | None = None
    """The cache that tokens are kept in. With one, text is scored in pieces that are fed through it, since a method
    that changes what is cached changes nothing in a single forward. None is `generate()`'s own."""

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model runs this way and in evaluation mode meanwhile.

        Raises:
            PlanError: the plan does not fit the model, or the model is shared already.
        """
        training = model.training
        model.eval()
        try:
            with ExitStack() as stack:
                how = self.recipe or self.plan
                if how is not None:
                    stack.enter_context(share(model, how))
                if self.patch is not None:
                    stack.enter_context(self.patch(model))
                yield
        finally:
            model.train(training)


def plan_arms(plans: Sequence[SharingPlan]) -> list[Arm]:
    """One arm for each different plan, in their order, labelled by its retention; the full one is "full cache"."""
    different = list(dict.fromkeys(plans))
    names = ["full cache" if plan.is_full else f"{plan.retention:.0%} of layers" for plan in different]
    taken = {name: names.count(name) for name in names}
    labels = []
    for i, name in enumerate(names):
        number = names[: i + 1].count(name)
        labels.append(name if taken[name] == 1 else f"{name} ({number})")
    return [Arm(label=label, plan=plan) for label, plan in zip(labels, different, strict=True)]
