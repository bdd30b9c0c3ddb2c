"""`lissom recipes`: the shipped library, strict checking, and a JSON Schema for editors."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Recipes: list, show, copy, check, schema.", rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `lissom recipes list` prints it.")]


@app.command("list")
def list_() -> None:
    """Name every shipped recipe with its first line."""
    from ..workflow.describe import names, shipped

    for name in names():
        first = shipped(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        print(f"{name:28} {first}")


@app.command()
def show(name: Name) -> None:
    """Print a shipped recipe."""
    from ..workflow.describe import shipped

    print(shipped(name).read_text(encoding="utf-8"), end="")


@app.command()
def copy(name: Name, to: Annotated[Path | None, typer.Argument(help="A file [default: NAME.yaml here].")] = None) -> None:
    """Copy a shipped recipe, to be edited."""
    from ..core.errors import UserError
    from ..core.files import write_text
    from ..workflow.describe import shipped

    source = shipped(name)
    target = to or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target}: exists already. Name another file.")
    write_text(target, source.read_text(encoding="utf-8"))
    print(target)


@app.command()
def check(files: Annotated[list[Path], typer.Argument(help="Recipe files.")]) -> None:
    """Check recipes strictly; every mistake is shown with file:line."""
    from ..core.errors import UserError
    from ..core.recipe import read

    wrong = []
    for file in files:
        try:
            read(file)
            print(f"{file}: ok")
        except UserError as e:
            wrong.append(str(e))
    if wrong:
        raise UserError("\n".join(wrong))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    from ..core.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))
