"""What can be said of a checkpoint's tokenizer from its files alone, without transformers, so that `plan` answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError

_RESTORE = "restore the file"


def check_tokenizer_files(folder: str | Path) -> None:
    """See that the JSON files of a tokenizer can be read and that it has a chat template; `load_tokenizer` checks the rest.

    Raises:
        UserError: no tokenizer_config.json, a broken file, or no chat template where transformers looks for one.
    """
    root = Path(folder)
    settings = _object(root / "tokenizer_config.json")
    if (root / "tokenizer.json").exists():
        _object(root / "tokenizer.json")
    templates = [root / "chat_template.jinja", *(root / "additional_chat_templates").glob("*.jinja")]
    if not settings.get("chat_template") and not any(path.is_file() and path.stat().st_size for path in templates):
        raise no_chat_template(folder)


def no_chat_template(folder: str | Path) -> UserError:
    """What to raise for a tokenizer without chat template."""
    return UserError(
        "tokenizer has no chat template", where=str(folder), instead="add the model's chat_template.jinja to the folder"
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("file is missing", where=str(path), instead="name a folder with a checkpoint and its tokenizer") from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8", where=str(path), instead=_RESTORE) from None
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON in line {error.lineno}", where=str(path), instead=_RESTORE) from None
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", where=str(path), instead=_RESTORE)
    return value
