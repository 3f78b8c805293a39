"""A griffe extension: docstrings, which are written to be read in an editor, made into Markdown."""

import re

import griffe


def as_markdown(text: str) -> str:
    """The docstring with its doctests shown as code, and signs that Markdown would take for its own escaped."""
    start = re.search(r"^>>> ", text, flags=re.MULTILINE)
    prose, examples = (text[: start.start()], text[start.start() :]) if start else (text, "")
    # a power is not bold, and a bound is not a quotation
    prose = re.sub(r"(?<=: )>", r"\>", prose.replace("**", r"\*\*"))
    # the google style shows a section of this name as code
    return prose + ("Examples:\n" + re.sub("^(?=.)", "    ", examples, flags=re.MULTILINE) if examples else "")


class Docstrings(griffe.Extension):
    """Rewrites each docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite one."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
