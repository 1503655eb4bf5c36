"""Files that `posttrain score` reads: answers, pairs, plain documents, rows of a benchmark; JSON lines or Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.data import files
from posttrain.data.formats import Record
from posttrain.data.sources import read_jsonl, read_parquet
from posttrain.reward.documents import Document
from posttrain.reward.types import Sample
from posttrain.stages.sampling import as_sample

PARQUET = ".parquet"


def read_answers(path: Path) -> list[Record]:
    """Normalised records, each an answer to a prompt (`completion`) or a pair (`chosen`, `rejected`); all of one kind.

    Raises:
        UserError: no such file, a damaged line, no records, or records that hold no answer.
    """
    records = read_parquet(path) if path.suffix == PARQUET else read_jsonl(path)
    kinds = {"pair" if "chosen" in record else "answer" if "completion" in record else "" for record in records}
    lacking = next((record for record in records if "chosen" not in record and "completion" not in record), None)
    if lacking is not None:
        raise UserError(
            f"nothing to score (columns: {', '.join(sorted(lacking))})",
            where=str(path),
            instead="give prompt and completion, or chosen and rejected",
        )
    if len(kinds) > 1:
        raise UserError("pairs and single answers in one file", where=str(path), instead="put them into two")
    return records


def is_pair_file(records: Sequence[Record]) -> bool:
    """Whether the records are pairs."""
    return "chosen" in records[0]


def sample_of(record: Record, side: str) -> Sample:
    """An answer of a record ("completion", "chosen", "rejected"), ready to be scored."""
    messages = record[side]
    return as_sample({**record, "prompt": [*record.get("prompt", ()), *messages[:-1]]}, messages[-1]["content"])


def read_documents(path: Path) -> list[Document]:
    """Documents: `text`, with `source` (else the file's name) and `domain` where given.

    Raises:
        UserError: no such file, a damaged line, no documents, or one without text.
    """
    documents = []
    for number, row in enumerate(read_rows(path), start=1):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            columns = ", ".join(sorted(row)) or "none"
            raise UserError(
                f"document {number} has no text (columns: {columns})", where=str(path), instead="name the column 'text'"
            )
        documents.append(Document(text, str(row.get("source") or path.stem), row.get("domain")))
    return documents


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Rows as they stand in the file, null counting as absent.

    Raises:
        UserError: no such file, a damaged line, no rows, or a line that is no object.
    """
    rows = files.require_some([row for _, row in files.read_rows(path)], path)
    return [{name: value for name, value in row.items() if value is not None} for row in rows]
