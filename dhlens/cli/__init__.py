"""The command line: `scan`, `ablate`, `predict`, `rag`, `rerank` and `circuit` run experiments, `show` prints them.

`dhlens compare` sets published heads side by side, `dhlens carryover` finished scans of several tasks; `dhlens plan`
tells what a model takes before it is downloaded.
"""

import sys

import typer

from dhlens.cli.carryover import carryover
from dhlens.cli.circuit import circuit
from dhlens.cli.compare import compare
from dhlens.cli.experiments import ablate, scan
from dhlens.cli.plan import plan
from dhlens.cli.predict import predict
from dhlens.cli.rag import rag
from dhlens.cli.rerank import rerank
from dhlens.cli.show import show

app = typer.Typer(
    help="Find, change, predict and show dynamic retrieval heads.", no_args_is_help=True, pretty_exceptions_enable=False
)
for command in (scan, ablate, predict, rag, rerank, circuit, show, compare, carryover, plan):
    app.command()(command)


def main() -> None:
    """The entry point: what the user can mend is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"dhlens: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("dhlens: stopped; the same command goes on from here", err=True)
        sys.exit(130)
