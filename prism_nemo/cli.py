"""The one command. Thin: parse, call the library, print.

Exit codes are a contract: 0 done; 1 the work failed; 2 the input or configuration is wrong and nothing was started;
75 stopped early on request with a checkpoint saved (run the same command again).
"""

from __future__ import annotations

import os
import sys

import typer

from prism_nemo.commands.analyze import analyze_app, merge
from prism_nemo.commands.card import card
from prism_nemo.commands.convert import export, import_, verify
from prism_nemo.commands.data import data_app
from prism_nemo.commands.evaluate import evaluate, regrade, retention, select
from prism_nemo.commands.machine import doctor, models, plan
from prism_nemo.commands.prompts import prompts_app, rollouts_app
from prism_nemo.commands.quickstart import quickstart
from prism_nemo.commands.report import report
from prism_nemo.commands.status import status
from prism_nemo.commands.study import study
from prism_nemo.commands.train import midtrain, rl
from prism_nemo.commands.watch import watch
from prism_nemo.errors import PrismError
from prism_nemo.quiet import quiet

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Retention-aware mid-training and verifiable-reward RL of open language models on Megatron-Core.",
)
# In the order of a pipeline, which is that of `--help`.
app.command()(quickstart)
app.command()(models)
app.command()(plan)
app.add_typer(data_app, name="data")
app.command("import")(import_)
app.command()(verify)
app.command()(export)
app.command()(card)
app.command()(midtrain)
app.add_typer(prompts_app, name="prompts")
app.command()(rl)
app.add_typer(rollouts_app, name="rollouts")
app.command("eval")(evaluate)
app.command()(regrade)
app.command()(select)
app.command()(retention)
app.add_typer(analyze_app, name="analyze")
app.command()(merge)
app.command()(status)
app.command()(watch)
app.command()(report)
app.command()(study)
app.command()(doctor)


def main() -> None:
    """Entry point: errors become one message and the exit code that they mean."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    try:
        app(standalone_mode=False)
    except PrismError as error:
        typer.echo(f"prism-nemo: {error}", err=True)
        sys.exit(error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        usage = getattr(error, "exit_code", None)
        if usage is not None and hasattr(error, "format_message"):
            typer.echo(f"prism-nemo: {error.format_message()}", err=True)
            sys.exit(usage)
        if isinstance(error, RuntimeError) and "transformer-engine" in str(error) and "meta package" in str(error):
            # Raised by Megatron-Core's `import transformer_engine`, which expects ImportError at most.
            typer.echo(f"prism-nemo: {error}; see: prism-nemo doctor", err=True)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
