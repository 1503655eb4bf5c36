"""The one exception whose text is meant for a person: printed as one line, exit code 2, no trace."""


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
        what: what is wrong, a clause without a full stop ("unknown key").
        where: the place ("configs/x.yaml: stages.sft.lenght", "data.jsonl:17"), or None.
        instead: what to write or do instead ("did you mean 'length'?"), or None.
    """

    def __init__(self, what: str, *, where: str | None = None, instead: str | None = None) -> None:
        self.what, self.where, self.instead = what, where, instead
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return " ".join((f"{line}; {self.instead}" if self.instead else line).split())

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive pickling by default, and errors cross Ray processes.
        return (_rebuild, (self.what, self.where, self.instead))


def _rebuild(what: str, where: str | None, instead: str | None) -> UserError:
    return UserError(what, where=where, instead=instead)
