"""Advice: one line for each thing in which a run departs from what the published guide found to work.

The guide is the README of diffusers' CogVideoX scripts. It trained 10 to 70 videos with a batch of 1, found that 25 and
more work, and passes on what the authors of CogVideoX recommend. Nothing here stops a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from train.config import TrainConfig

if TYPE_CHECKING:
    from train.run import Run

LEAST_PRODIGY_RATE = 0.1  # the guide warns below it
LEAST_RANK = 16  # 16 and 32 serve where the base model is moderately good already, 64 and more where it is not
LEAST_CLIPS = 25
CAPTION_WORDS = range(50, 101)
MOST_OTHER_CAPTIONS = 0.25  # share of captions of another length that is not worth a line
MOST_EPOCHS = 80  # 2,000 steps of 25 videos: the most passes that the guide found to serve; it recommends 30 to 40
LOOKED_AT = 10_000  # rows, the first of the data sets
LATIN = 0x250  # the first character after the Latin blocks


@dataclass(frozen=True)
class Facts:
    """What is known of a run's data.

    Attributes:
        clips: that are trained on.
        words: of each caption that was looked at and is told in words.
        foreign: captions that were looked at and look as if they were not English.
        epochs: passes over the data set in the whole run.
        steps: optimizer steps of the whole run.
    """

    clips: int
    words: list[int]
    foreign: int
    epochs: float
    steps: int


def advice(config: TrainConfig, facts: Facts) -> Iterator[str]:
    """What there is to say, a line each; nothing of a run that follows the guide."""
    yield from _of_flags(config, facts.steps)
    yield from _of_data(facts)


def _of_flags(config: TrainConfig, steps: int) -> Iterator[str]:
    rank, alpha, warmup = config.rank, config.lora_alpha, config.lr_warmup_steps
    if config.optimizer == "prodigy" and config.learning_rate < LEAST_PRODIGY_RATE:
        yield (
            f"--learning_rate {config.learning_rate:g} is low for prodigy, whose own estimate it multiplies: the guide "
            "took 0.5, its authors 1"
        )
    if rank < LEAST_RANK:
        yield (
            f"--rank {rank} is low: {LEAST_RANK} or 32 serve where the base model is moderately good at such captions, "
            "64 and more where it is not"
        )
    if not config.use_rslora and alpha not in (rank, rank // 2):
        yield f"--lora_alpha {alpha:g} is neither the rank, {rank}, nor half of it, of which both worked for the guide"
    if warmup and config.lr_scheduler in ("constant", "piecewise_constant"):
        yield f"--lr_warmup_steps {warmup}: {config.lr_scheduler} has no warm-up; constant_with_warmup has"
    elif warmup >= steps:
        yield f"--lr_warmup_steps {warmup} of {steps} steps: the learning rate never gets to where it should"


def _of_data(facts: Facts) -> Iterator[str]:
    if facts.clips < LEAST_CLIPS:
        yield f"{facts.clips} clips are few: {LEAST_CLIPS} and more worked best for a new concept or style"
    others = sum(count not in CAPTION_WORDS for count in facts.words)
    if others > MOST_OTHER_CAPTIONS * len(facts.words):
        yield (
            f"{others} of {len(facts.words)} captions are not of {CAPTION_WORDS[0]} to {CAPTION_WORDS[-1]} words: "
            "CogVideoX knows long descriptions, such as a language model writes"
        )
    if facts.foreign:
        yield (
            f"{facts.foreign} of {facts.foreign + len(facts.words)} captions do not look like English, which is all "
            "that CogVideoX knows (a guess: most of their letters are not Latin)"
        )
    if facts.epochs > MOST_EPOCHS:
        yield (
            f"{facts.epochs:.4g} epochs are more than the {MOST_EPOCHS} that the guide went to: clips may be learnt by "
            "heart; 30 to 40 are usual, 1,500 to 2,000 steps of 50 clips or 4,000 of 100"
        )


def facts_of(run: Run) -> Facts:
    """The facts of a run; of its captions, those of the first LOOKED_AT rows of its data sets."""
    samples = run.samples
    held = run.held_out.numbers if run.held_out and run.held_out.samples is samples else ()
    untrained = {int(number) for number in held}
    clips: set[bytes] = set()
    words: list[int] = []
    foreign = 0
    rows = (row for dataset in samples.datasets for row in dataset.rows("latent_key", "caption"))
    for number, row in enumerate(islice(rows, LOOKED_AT)):
        if number in untrained:
            continue
        clips.add(row["latent_key"])
        if is_foreign(row["caption"]):
            foreign += 1
        else:
            words.append(len(row["caption"].split()))
    return Facts(len(clips), words, foreign, run.max_steps / run.sampler.steps_per_epoch, run.max_steps)


def is_foreign(caption: str) -> bool:
    """Whether most letters of a caption are not Latin: a guess at whether it is not English."""
    if caption.isascii():
        return False
    letters = [letter for letter in caption if letter.isalpha()]
    return 2 * sum(ord(letter) >= LATIN for letter in letters) > len(letters)
