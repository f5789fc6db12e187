"""Sizes of the experiment, and the order of its runs, any beginning of which is of use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .methods import METHODS, Method

MAIN = ("lora", "pissa", "kpm-hold1", "ipm-hold1", "kpm-hold8", "ipm-hold8")
PUBLISHED = ("kpm-published", "ipm-published")
PLUS = ("kpm++-hold1", "ipm++-hold1")
# Of one size, and of one scale. Of methods that are close relatives the first says more.
STARTS = (
    *("lora", "task-keep", "white", "task", "kpm-hold1", "ipm-hold1", "random", "kpm-both"),
    "task-frozen",
)
# The forms in which one adapter can be trained, each at the rate that suits it.
FORMS = (
    "lora",
    "lora-r",
    *(name for mode in ("kpm", "ipm") for name in METHODS if name.startswith(f"{mode}-")),
)


@dataclass(frozen=True)
class Run:
    """One training."""

    method: Method
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its file's, without the ending."""
        return f"{self.method.name}-lr{self.learning_rate:.0e}-seed{self.seed}"


@dataclass(frozen=True)
class Profile:
    """How large an experiment is.

    Attributes:
        methods: groups of methods; all of one group goes before the next group.
        learning_rates: how many of each method's, all with the first seed.
        seeds: how many, of each group; the others with the best learning rate. Each is another
            order of other problems.
        tie: rates whose loss with the first seed is above the lowest by at most this share of it
            are run with the other seeds too, before the best one is chosen.
        rank: components of every layer; LoRA has twice that rank, or the same (`lora-r`).
        steps: of training.
        batch_size: problems a step.
        max_tokens: of a problem; longer ones are left out.
        checkpoints: steps after which the model is measured.
        problems: measured.
        questions: measured.
        shots: answered questions before each.
        texts: pieces of prose measured.
        text_tokens: of each.
        samples: calibration sequences of CorDA, and of each candidate of CorDA++.
        seq_len: tokens of each.
        candidates: of CorDA++.
        ranked: questions at the end, the right answer among ten; 0 for none.
        apart: problems whose gradients task starts are made of, and none is trained on.
        outside: whether to measure how far training leaves CorDA's components.
        device: where it runs.
        minutes: after which no run is begun; None for no limit.
    """

    methods: tuple[tuple[str, ...], ...]
    learning_rates: int
    seeds: tuple[int, ...]
    rank: int
    steps: int
    batch_size: int
    max_tokens: int
    checkpoints: tuple[int, ...]
    problems: int
    questions: int
    shots: int
    texts: int
    text_tokens: int
    samples: int
    seq_len: int
    candidates: int = 5
    tie: float = 0.0
    ranked: int = 32
    apart: int = 0
    outside: bool = False
    device: str = "cpu"
    minutes: float | None = None

    def grid(self, group: Sequence[str]) -> Iterator[Run]:
        """A group's runs with the first seed, the first learning rates first."""
        for index in range(self.learning_rates):
            for name in group:
                method = METHODS[name]
                yield Run(method, method.learning_rates[index], seed=0)

    def repeats(self, run: Run) -> Iterator[Run]:
        """The same with the other seeds of its group."""
        (seeds,) = (
            seeds
            for group, seeds in zip(self.methods, self.seeds, strict=True)
            if run.method.name in group
        )
        return (replace(run, seed=seed) for seed in range(1, seeds))

    def planned(self, tied: Mapping[str, int]) -> int:
        """How many runs the profile has where so many rates of a method may be its best one."""
        return sum(
            self.learning_rates + (seeds - 1) * tied.get(name, 1)
            for group, seeds in zip(self.methods, self.seeds, strict=True)
            for name in group
        )


PROFILES = {
    "smoke": Profile(
        methods=(tuple(METHODS),),
        learning_rates=1,
        seeds=(1,),
        rank=4,
        steps=3,
        batch_size=2,
        max_tokens=96,
        checkpoints=(1, 3),
        problems=4,
        questions=12,
        ranked=4,
        apart=4,
        outside=True,
        shots=2,
        texts=2,
        text_tokens=32,
        samples=2,
        seq_len=64,
        candidates=2,
    ),
    "forms": Profile(
        methods=(FORMS,),
        learning_rates=1,
        seeds=(1,),
        rank=16,
        steps=24,
        batch_size=4,
        max_tokens=160,
        checkpoints=(24,),
        problems=32,
        questions=64,
        shots=8,
        texts=4,
        text_tokens=256,
        samples=16,
        seq_len=512,
        outside=True,
    ),
    "starts": Profile(
        methods=(STARTS,),
        learning_rates=4,
        seeds=(3,),
        rank=16,
        steps=24,
        batch_size=3,
        max_tokens=96,
        checkpoints=(10, 24),
        problems=16,
        questions=112,
        shots=8,
        texts=4,
        text_tokens=48,
        samples=16,
        seq_len=256,
        tie=0.03,
        ranked=0,
        apart=48,
    ),
    "starts-gpu": Profile(
        methods=(STARTS, ("pissa", *PUBLISHED, *PLUS)),
        learning_rates=5,
        seeds=(5, 5),
        rank=16,
        steps=96,
        batch_size=16,
        max_tokens=192,
        checkpoints=(6, 12, 24, 48, 96),
        problems=128,
        questions=256,
        shots=8,
        texts=16,
        text_tokens=128,
        samples=64,
        seq_len=512,
        tie=0.03,
        ranked=0,
        apart=256,
        device="cuda",
        minutes=8,
    ),
    "cpu": Profile(
        methods=(MAIN, PUBLISHED + PLUS),
        learning_rates=3,
        seeds=(3, 1),
        rank=16,
        steps=32,
        batch_size=4,
        max_tokens=160,
        checkpoints=(4, 12, 32),
        problems=32,
        questions=64,
        shots=8,
        texts=4,
        text_tokens=256,
        samples=16,
        seq_len=512,
    ),
    "gpu": Profile(
        methods=(MAIN, PUBLISHED + PLUS),
        learning_rates=3,
        seeds=(3, 3),
        rank=16,
        steps=96,
        batch_size=16,
        max_tokens=192,
        checkpoints=(6, 12, 24, 48, 96),
        problems=256,
        questions=256,
        ranked=256,
        shots=8,
        texts=32,
        text_tokens=256,
        samples=64,
        seq_len=512,
        device="cuda",
        minutes=10,
    ),
}
