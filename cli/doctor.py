"""`lissom doctor`: versions, device, embedded files, known-bad combinations."""

import json

import typer

from . import _options as o


def doctor(json_: o.Json = False) -> None:
    """Say what is installed and whether it fits together. Exit code 1 if something does not."""
    from ..workflow.doctor import examine

    findings = examine()
    if json_:
        print(json.dumps(findings, indent=2))
    else:
        for name, value in findings["found"].items():
            print(f"{name:20} {value}")
        for problem in findings["problems"]:
            print(f"problem: {problem}")
        if not findings["problems"]:
            print("everything fits together")
    raise typer.Exit(1 if findings["problems"] else 0)
