"""`tunejax preprocess CONFIG`: rows in colour as they will be trained on, and an audit of all of them."""

import argparse

from tunejax.config import load
from tunejax.core import errors
from tunejax.data import audit
from tunejax.recipes import assemble, rows, runtime, settings
from tunejax.train import sharding


def main(args: argparse.Namespace) -> None:
    """Prints sample rows (what bears loss, what is masked, where packing cuts) and totals with warnings."""
    if args.rows < 0:
        raise errors.ConfigError(f"--rows is {args.rows}; expected 0 or more")
    config = load.load(args.config, args.overrides)
    runtime.begin()
    opened = assemble.opened(config)
    data = rows.read(config, opened.tokenizer, opened.model_config.kind, opened.prompt, opened.known)
    sizes = settings.batches(config, sharding.make_mesh(**config.mesh.model_dump()))
    loader = rows.loaders(config, data, sizes, opened.tokenizer).train

    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(audit.LEGEND + "\n", style="dim")
    for row in audit.sample_rows(loader, opened.tokenizer, args.rows):
        # Without colours (a file, a pipe) the same is said by brackets.
        text = audit.render_rich(row) if console.color_system else audit.render_text(row)
        console.print(text, markup=False)
        console.print()
    console.print(audit.render_totals(audit.totals(loader.plan.corpus, loader)), markup=False)
    if data.held_out is not None:
        console.print("\nheld out", style="bold")
        console.print(audit.render_totals(audit.totals(data.held_out)), markup=False)
