"""tunejax on SST-2: the shipped config's own run, from the start that the torch side wrote."""

import common


def main() -> None:
    """Runs the config and prints one JSON line."""
    from tunejax.recipes import folder, train

    args = common.arguments()
    config = common.config(args)
    summary = train.run(config)
    lines = folder.read_rows(args.folder / "run" / "metrics.jsonl")
    common.report(
        "tunejax",
        args,
        [line for line in lines if "loss" in line],
        before=summary["before_accuracy"],
        accuracy=summary["eval_accuracy"],
        trained=summary["trained_parameters"],
    )


if __name__ == "__main__":
    main()
