"""The run of `python -m preprocess.caption`: which clips need a caption, frames to captions, captions rewritten.

    manifest -> rows, with what OUTPUT and the journal know -> frames -> captions, model freed -> rewritten -> OUTPUT

Each text goes into the journal (`.OUTPUT.unfinished`), flushed to the disk, before the next batch begins; OUTPUT is
written when all are there, and the journal removed after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from preprocess.captions import (
    Author,
    Key,
    Known,
    Row,
    add_recipes,
    beside,
    name_of,
    named,
    row_of,
    video_of,
    write_manifest,
)
from preprocess.glimpses import Look, read_glimpses
from preprocess.journal import Journal
from preprocess.video import PIXELS_VERSION
from shared.console import Progress
from shared.errors import ConfigError, ManifestError, UserError, VideoError
from shared.seeds import seed_for
from shared.storage import canonical_json, digest_of, write_atomically

if TYPE_CHECKING:
    from preprocess.caption import CaptionConfig
    from preprocess.generation import ModelFiles

T = TypeVar("T")


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        rows: of the manifest that was written.
        captioned, rewritten: texts that this run made; what an earlier one had made counts as found.
        found: texts that an unfinished run had made.
        silent: captions that stayed as they were, because the rewriting model wrote nothing.
        differing: captions that OUTPUT has from the manifest, which says something else now; OUTPUT's stay.
        unnamed: rows that OUTPUT had and the manifest does not name; they stay.
        rejected: video, reason and detail of clips without a caption.
    """

    rows: list[Row] = field(default_factory=list)
    captioned: int = 0
    rewritten: int = 0
    found: int = 0
    silent: int = 0
    differing: int = 0
    unnamed: int = 0
    rejected: list[tuple[str, str, str]] = field(default_factory=list)


def caption(config: CaptionConfig) -> Outcome:
    """Run the command.

    Raises:
        UserError: a manifest, a model or a file that cannot be used; no clip has a caption.
    """
    output = Path(config.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        opened = Journal(output.with_name(f".{output.name}.unfinished"))
    except OSError as error:
        raise ConfigError(
            f"--output {output}: cannot be written ({error.strerror}); give a path in a folder of yours"
        ) from error
    with opened as journal:
        return _Run(config, output, journal).finish()


class _Run:
    """One run: the rows that it changes step by step, and the texts that are made so far, by clip."""

    def __init__(self, config: CaptionConfig, output: Path, journal: Journal) -> None:
        self._config, self._output, self._journal = config, output, journal
        self._captioned: dict[Key, tuple[str, Author]] = {}
        self._rewritten: dict[tuple[Key, str], tuple[str, Author]] = {}
        self._failed: dict[Key, VideoError] = {}
        self._recipes: dict[str, dict[str, Any]] = {}
        self._is_told = False
        self._outcome = Outcome()
        self._read_manifest()  # a mistake in it must not cost a download of gigabytes
        self._captioner = _model(config, config.caption_model, config.caption_revision, sees=True)
        self._rewriter = _model(config, config.rewrite_model, config.rewrite_revision, sees=False)
        self._caption_author = self._author(self._captioner, self._caption_recipe)
        self._rewrite_author = self._author(self._rewriter, self._rewrite_recipe)
        self._recall()

    def _author(self, model: ModelFiles | None, recipe: Callable[[], dict[str, Any]]) -> Author | None:
        if model is None:
            return None
        facts = {"model": model.name, "revision": model.revision, "dtype": model.dtype, **recipe()}
        facts |= {name: getattr(self._config, name) for name in ("temperature", "max_new_tokens", "seed")}
        digest = digest_of(facts, 6).hex()
        self._recipes[digest] = facts
        return Author(model.name, model.revision, digest)

    def _caption_recipe(self) -> dict[str, Any]:
        settings = {name: getattr(self._config, name) for name in ("frames", "frame_size", "clip_seconds")}
        return {"task": "caption", "prompt": self._config.prompt(), "pixels_version": PIXELS_VERSION, **settings}

    def _rewrite_recipe(self) -> dict[str, Any]:
        return {"task": "rewrite", "template": self._config.template()}

    def _recall(self) -> None:
        """Take what an unfinished run has written; with `--overwrite` only what this one would write as well."""
        for entry in self._journal.entries:
            try:
                if "run" in entry:
                    self._recipes = {**entry["run"]["recipes"], **self._recipes}
                    if entry["run"]["overwrite"] and not self._config.overwrite:
                        raise ConfigError(
                            f"{self._journal.path}: is of an unfinished run with --overwrite; give --overwrite to go "
                            "on with it, or remove the file"
                        )
                    continue
                video, start_s, end_s = entry["clip"]
                key: Key = (video_of(video, self._output), start_s, end_s)
                author, text = Author(**entry["author"]), str(entry["text"])
                ours = self._rewrite_author if "of" in entry else self._caption_author
                if self._config.overwrite and ours not in (None, author):
                    continue
                if "of" in entry:
                    self._rewritten[key, entry["of"]] = text, author
                else:
                    self._captioned[key] = text, author
            except (KeyError, TypeError, ValueError) as error:
                raise ManifestError(
                    f"{self._journal.path}: {entry} is not as it was written; remove that line"
                ) from error
        self._outcome.found = len(self._captioned) + len(self._rewritten)

    def _read_manifest(self) -> None:
        """The rows as they are before this run: as OUTPUT has them, else as the manifest does."""
        config, known = self._config, Known(self._output)
        self._rows: list[Row] = []
        self._paths: dict[Key, str] = {}
        for record in config.records(to_caption=True, besides=self._output):
            row = row_of(record)
            self._paths[row.key] = record.path
            held = known.take(row.key)
            if held and held.caption_source == "manifest" and row.caption not in ("", held.caption):
                self._outcome.differing += 1
            self._rows.append(held.joined(row) if held else row)
        self._unnamed = known.rest()

    def finish(self) -> Outcome:
        """Make what is missing and write OUTPUT."""
        self._caption_clips()
        self._rows = [self._with_caption(row) for row in self._rows]
        self._check_captions()
        self._rewrite_captions()
        self._rows = [self._with_rewrite(row) for row in self._rows]
        outcome, rows = self._outcome, [row for row in self._rows if row.caption] + self._unnamed
        outcome.rows, outcome.unnamed = named(rows, self._output), len(self._unnamed)
        used = {recipe for row in rows for recipe in (row.caption_recipe, row.rewrite_recipe)}
        try:
            add_recipes(self._output, {name: facts for name, facts in self._recipes.items() if name in used})
            self._tell_rejected()
            write_manifest(self._output, outcome.rows)
        except OSError as error:
            way = "make room and run the same command again: what it has stays"
            raise ManifestError(f"{self._output}: cannot be written ({error.strerror}); {way}") from error
        self._journal.remove()
        return outcome

    def _check_captions(self) -> None:
        if not any(row.caption for row in self._rows):
            video, reason, detail = self._outcome.rejected[0]
            raise UserError(
                f"all {len(self._rows)} clips were rejected, the first {video}: {reason} ({detail}); "
                f"{self._output} was not written; mend or remove them"
            )

    def _tell_rejected(self) -> None:
        path = beside(self._output, "rejected")
        names = ("video", "reason", "detail")
        lines = [canonical_json(dict(zip(names, clip, strict=True))) + b"\n" for clip in self._outcome.rejected]
        if lines:
            write_atomically(path, b"".join(lines))
        else:
            path.unlink(missing_ok=True)

    def _portable(self, key: Key) -> Key:
        """A clip's key as it stays when the folder moves."""
        return (name_of(key[0], self._output), *key[1:])

    def _write_down(self, author: Author, texts: Iterable[dict[str, Any]]) -> None:
        """Add an author's texts to the journal; before this run's first ones, what it is."""
        if not self._is_told:
            run = {"overwrite": self._config.overwrite, "recipes": self._recipes}
            self._journal.append({"run": run})
            self._is_told = True
        self._journal.append(*({**text, "author": asdict(author)} for text in texts))

    # --- captions

    def _needs_caption(self, row: Row) -> bool:
        return self._config.overwrite or not row.caption

    def _caption_clips(self) -> None:
        wanted = (row.key for row in self._rows if self._needs_caption(row) and row.key not in self._captioned)
        todo = list(dict.fromkeys(wanted))
        if not todo or self._captioner is None or self._caption_author is None:
            return
        from preprocess.generation import Captioner  # late: torch

        config, author = self._config, self._caption_author
        clips = {key: (self._paths[key], *key[1:]) for key in todo}
        look = Look(config.frames, config.frame_size, config.clip_seconds)
        with read_glimpses(clips, look, config.decoders, config.decode_timeout, self._failed) as glimpses:
            read = Progress(glimpses, name="captions", unit="clip", total=len(todo))
            batches = _batches(iter(read), config.batch_size)
            first = next(batches, None)
            if first is None:  # none can be read: no model is loaded to learn that
                return
            with Captioner(self._captioner, config.decoding, config.prompt()) as captioner:
                for batch in chain([first], batches):
                    keys = [key for key, _ in batch]
                    seeds = [seed_for(config.seed, *map(str, self._portable(key)), "caption") for key in keys]
                    texts = captioner.caption([frames for _, frames in batch], seeds)
                    written = dict(zip(keys, texts, strict=True))
                    told = ({"clip": self._portable(key), "text": text} for key, text in written.items())
                    self._write_down(author, told)
                    self._captioned |= {key: (text, author) for key, text in written.items()}
                    self._outcome.captioned += len(texts)

    def _with_caption(self, row: Row) -> Row:
        if not self._needs_caption(row):
            return row
        text, author = self._captioned.get(row.key, ("", None))
        if text and author is not None:
            return row.captioned(text, author)
        error, name = self._failed.get(row.key), name_of(row.video, self._output)
        if error is not None:
            self._outcome.rejected.append((name, error.reason, error.detail))
        elif self._captioner is not None:
            self._outcome.rejected.append((name, "empty_caption", "the model wrote nothing"))
        elif not row.caption:
            self._outcome.rejected.append((name, "no_caption", "there is none yet; give --caption_model"))
        return row  # an older caption stays

    # --- rewriting

    def _raw(self, row: Row) -> str | None:
        """What is to be rewritten of a row; None: nothing."""
        if self._rewriter is None or not row.caption or not (self._config.overwrite or self._is_fresh(row)):
            return None
        return row.raw_caption if row.caption_source == "rewrite" and row.raw_caption else row.caption

    def _is_fresh(self, row: Row) -> bool:
        """Whether a row's caption is one that this run, or the unfinished one before it, has just made."""
        text, author = self._captioned.get(row.key, ("", None))
        return author is not None and (row.caption, row.caption_recipe) == (text, author.recipe)

    def _rewrite_captions(self) -> None:
        raws = ((row.key, self._raw(row)) for row in self._rows)
        todo = list(dict.fromkeys((key, raw) for key, raw in raws if raw and (key, raw) not in self._rewritten))
        if not todo or self._rewriter is None or self._rewrite_author is None:
            return
        from preprocess.generation import Rewriter  # late: torch

        config, author = self._config, self._rewrite_author
        with Rewriter(self._rewriter, config.decoding, config.template()) as rewriter:
            with Progress[str](name="rewriting", unit="clip", total=len(todo)) as bar:
                for batch in _batches(iter(todo), config.batch_size):
                    seeds = [seed_for(config.seed, *map(str, self._portable(key)), "rewrite") for key, _ in batch]
                    texts = rewriter.rewrite([raw for _, raw in batch], seeds)
                    written = list(zip(batch, texts, strict=True))
                    told = ({"clip": self._portable(key), "of": raw, "text": text} for (key, raw), text in written)
                    self._write_down(author, told)
                    self._rewritten |= {clip: (text, author) for clip, text in written}
                    self._outcome.rewritten += len(texts)
                    bar.update(len(texts))

    def _with_rewrite(self, row: Row) -> Row:
        raw = self._raw(row)
        if raw is None:
            return row
        text, author = self._rewritten[row.key, raw]
        if not text:
            self._outcome.silent += 1
            return row
        return row.rewritten(text, raw, author)


def _model(config: CaptionConfig, name: str | None, revision: str | None, *, sees: bool) -> ModelFiles | None:
    if name is None:
        return None
    from preprocess.generation import fetch_model  # late: torch

    return fetch_model(name, sees=sees, revision=revision, cache_dir=config.cache_dir, dtype=config.dtype)


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
