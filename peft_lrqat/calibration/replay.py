"""Runs a model one block at a time: everything around the blocks is the model's own code.

A pass runs the model as it is, but a block before the one that is wanted hands its input on, and
the wanted one gets the hidden states that were kept for it. The pass ends there. So masks,
positions and what the blocks of a stack share are what the model makes, for any architecture whose
blocks stand in an `nn.ModuleList` and take hidden states first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


Batch: TypeAlias = Mapping[str, Any]


@dataclass
class Block:
    """One block of a stack: its name in the model, and how it gives back its hidden states."""

    name: str
    module: nn.Module
    stack: int  # blocks of one stack follow each other
    last: bool = False  # of its stack
    tail: tuple[Any, ...] | None = None  # what it returns after the hidden states; None: no tuple

    def pack(self, hidden: Tensor, tail: tuple[Any, ...] | None) -> Any:
        return hidden if self.tail is None else (hidden, *(self.tail if tail is None else tail))


@dataclass
class Stream:
    """What one version of the model, such as the rounded one, has computed so far."""

    hidden: list[Tensor | None]  # by batch: input of the next block; None: as the model makes it
    finished: dict[int, list[Tensor]] = field(default_factory=dict)  # by stack: its last output
    tails: list[tuple[Any, ...] | None] = field(default_factory=list)  # of the block before

    def release(self, batch: int) -> None:
        """Forgets the input of the next block for a batch: the block has run."""
        self.hidden[batch] = None


class _Reached(Exception):  # noqa: N818, it is no error
    """The wanted block has run."""


def find_blocks(model: nn.Module, targets: Sequence[str]) -> list[list[Block]]:
    """The stacks of blocks that hold ``targets``, in the order of the module tree.

    A stack is an `nn.ModuleList` of modules of one class that is not inside another stack.
    """
    stacks: list[list[Block]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(inside or ("\0",)):
            continue
        prefix = f"{name}."
        kinds = {type(child) for child in module}
        if len(kinds) == 1 and any(target.startswith(prefix) for target in targets):
            number = len(stacks)
            stacks.append([Block(f"{prefix}{i}", child, number) for i, child in enumerate(module)])
            stacks[-1][-1].last = True
            inside += (prefix,)
    return stacks


class Replay:
    """The blocks of ``model`` in the order they run, and passes that end at one of them.

    Args:
        model: in evaluation mode; modules outside the blocks must have their weights.
        batches: keyword arguments of the model, a dict for each batch.
        targets: names of the modules to be rounded; they tell what a block is.
        load: gives a block its weights; the default is for a model that has them.

    Raises:
        ValueError: if there are no blocks, or the model does more between two blocks than to hand
            the hidden states on.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        targets: Sequence[str],
        load: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.model, self.batches, self.load = model, batches, load
        stacks = find_blocks(model, targets)
        if not stacks:
            raise ValueError(
                f"{type(model).__name__} has no `nn.ModuleList` of blocks that hold the target "
                "modules, so it cannot be calibrated a block at a time; leave the method out"
            )
        self._own = {b.name: b.module.forward for stack in stacks for b in stack}
        self.blocks = self._in_order(stacks)

    def stream(self) -> Stream:
        """One that starts with what the model itself makes of the batches."""
        return Stream([None] * len(self.batches))

    @contextmanager
    def _forwards(self, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Blocks compute these instead; an attribute of the module hides the class's method."""
        modules = {name: self.model.get_submodule(name) for name in forwards}
        hidden = {name: vars(module).get("forward") for name, module in modules.items()}
        for name, forward in forwards.items():
            vars(modules[name])["forward"] = forward
        config = getattr(self.model, "config", None)
        use_cache = getattr(config, "use_cache", None)
        if use_cache:
            config.use_cache = False  # type: ignore[union-attr]
        try:
            yield
        finally:
            if use_cache:
                config.use_cache = use_cache  # type: ignore[union-attr]
            for name, module in modules.items():
                vars(module).pop("forward")
                if hidden[name] is not None:  # such as that of a hook of accelerate
                    vars(module)["forward"] = hidden[name]

    def _in_order(self, stacks: list[list[Block]]) -> list[Block]:
        """All blocks as they run; learns how each stack's blocks give back hidden states."""
        order: list[Block] = []
        wanted = {block.name: block for stack in stacks for block in stack}
        handed: dict[int, Tensor] = {}

        def run(block: Block, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                raise ValueError(
                    f"`{block.name}` does not take hidden states as its first argument, so that "
                    f"{type(self.model).__name__} cannot be calibrated a block at a time"
                )
            if block in order:
                raise ValueError(
                    f"`{block.name}` runs twice in one pass, so that {type(self.model).__name__} "
                    "cannot be calibrated a block at a time"
                )
            before = handed.get(block.stack)
            if before is not None and before is not hidden:
                raise ValueError(
                    f"{type(self.model).__name__} changes the hidden states between two blocks, "
                    f"before `{block.name}`, so that it cannot be calibrated a block at a time"
                )
            order.append(block)
            if before is None:
                # Of the first block of a stack, all others learn what a block returns.
                self.load(block.name)
                with torch.no_grad():
                    returned = self._own[block.name](*args, **kwargs)
                if not isinstance(returned, Tensor):
                    hidden, *tail = returned
                    for other in stacks[block.stack]:
                        other.tail = tuple(tail)
                else:
                    hidden = returned
            hidden = hidden.view_as(hidden)
            handed[block.stack] = hidden
            if len(order) == len(wanted):
                raise _Reached
            return block.pack(hidden, None)

        forwards = {
            name: lambda *args, _block=block, **kwargs: run(_block, *args, **kwargs)
            for name, block in wanted.items()
        }
        with self._forwards(forwards), torch.no_grad(), suppress(_Reached):
            self.model(**self.batches[0])
        if missing := [name for name, block in wanted.items() if block not in order]:
            raise ValueError(
                f"`{missing[0]}` does not run in a pass of {type(self.model).__name__} over the "
                "calibration data, so that it cannot be calibrated; leave it out of "
                "`target_modules`"
            )
        return order

    def run(
        self,
        number: int,
        batch: int,
        stream: Stream,
        compute: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        """Runs one batch up to and through block ``number``.

        Args:
            number: of the block in ``blocks``; the ones before must be done.
            batch: number of the batch.
            stream: the version of the model; gives the block its hidden states.
            compute: is called in the place of the block's ``forward``, which is the default.

        Returns:
            The hidden states after the block, and what else it returns.
        """
        wanted = self.blocks[number]
        result: list[Any] = []

        def hand_on(position: int, *args: Any, **kwargs: Any) -> Any:
            block = self.blocks[position]
            hidden = args[0] if args else kwargs["hidden_states"]
            if block.last:  # its stack is finished
                hidden = stream.finished[block.stack][batch].to(hidden.device)
            before = position == number - 1 and stream.tails
            return block.pack(hidden, stream.tails[batch] if before else None)

        def reached(*args: Any, **kwargs: Any) -> Any:
            kept = stream.hidden[batch]
            if kept is not None:
                kept = kept.to((args[0] if args else kwargs["hidden_states"]).device)
                if args:
                    args = (kept, *args[1:])
                else:
                    kwargs["hidden_states"] = kept
            returned = (compute or self._own[wanted.name])(*args, **kwargs)
            hidden, tail = returned, None
            if not isinstance(returned, Tensor):
                hidden, *rest = returned
                tail = tuple(rest)
            result.extend((hidden, tail))
            raise _Reached

        forwards: dict[str, Callable[..., Any]] = {
            block.name: lambda *args, _at=position, **kwargs: hand_on(_at, *args, **kwargs)
            for position, block in enumerate(self.blocks[:number])
        }
        with self._forwards(forwards | {wanted.name: reached}):
            try:
                self.model(**self.batches[batch])
            except _Reached:
                return result[0], result[1]
        raise RuntimeError(f"`{wanted.name}` did not run")

    def advance(self, number: int, stream: Stream, outputs: Sequence[tuple[Tensor, Any]]) -> None:
        """Makes the results of `run` on all batches the inputs of the next block."""
        block = self.blocks[number]
        hidden = [output[0] for output in outputs]
        stream.tails = [output[1] for output in outputs] if block.tail is not None else []
        if block.last:
            stream.finished[block.stack] = hidden
            stream.hidden, stream.tails = [None] * len(hidden), []
        else:
            stream.hidden = list(hidden)
