"""The commands: each parses, calls the public API, prints."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import clipcore as cc
from clipcore.cli import demo as demo_module
from clipcore.cli import views
from clipcore.cli.inputs import check_output, check_weight_file, load_model, parse_limit, parse_rules, parse_sample
from clipcore.cli.output import NOT_VERIFIED, Session, hushed, session

app = typer.Typer(
    name="clipcore",
    help="Gradients clipped with one exact meaning in every framework; trained weights migrated and the result proved.",
    epilog="Exit codes: 0 ok, 1 not verified, 2 bad input.   Start with: clipcore demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[str, typer.Argument(help="The model copied from, as backend:module:factory.")]
Target = Annotated[str, typer.Argument(help="The model written to, as backend:module:factory.")]
Weights = Annotated[
    str | None, typer.Option(metavar="FILE", help="Weights to load into it, in its framework's format.")
]
Sample = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|SHAPE",
        help="One input as the source takes it: x.npy, x.npz (several by name), or a shape such as 1,3,224,224.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the random sample, where a shape is given.")]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="SOURCE=TARGET",
        help="A layer or tensor of the source and where it belongs: names, or a pattern and its groups; repeatable.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Take no name and no order for evidence, only proof and rules.")]
Unmapped = Annotated[
    str, typer.Option(metavar="refuse|keep", help="Of layers without a counterpart: refuse, or leave them as they are.")
]
PlanFile = Annotated[str | None, typer.Option("--plan", metavar="FILE", help="A plan that clipcore plan wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command(epilog="Example: clipcore backends")
def backends(as_json: Json = False, debug: Debug = False) -> None:
    """List the installed backends, and say of each whether it works."""
    with session(as_json=as_json, debug=debug) as running:
        with running.step("importing the backends"):
            found = {name: _state(name) for name in cc.backends()}
        running.answer({"backends": found}, views.backends(found))


def _state(name: str) -> dict[str, Any]:
    try:
        with hushed():
            backend = cc.get_backend(name)
    except cc.BackendError as err:
        return {"works": False, "does": [], "error": str(err)}
    tiers = {"clip": "to_host", "train": "attach", "migrate": "write", "verify": "run"}
    return {"works": True, "does": [verb for verb, has in tiers.items() if hasattr(backend, has)], "error": None}


@app.command(epilog="Example: clipcore demo --output pictures")
def demo(
    output: Annotated[str, typer.Option(metavar="DIR", help="Where the two pictures go.")] = "clipcore-demo",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train in PyTorch, migrate to Keras, prove it, go on training: the whole job on handwritten digits.

    Takes under a minute. Needs both backends, scikit-learn and matplotlib.
    """
    with session(as_json=as_json, debug=debug) as running:
        outcome = demo_module.run(Path(output), running.step)
        running.answer(outcome.to_dict(), *demo_module.tables(outcome))
        if not outcome.ok:
            raise typer.Exit(NOT_VERIFIED)


@app.command(epilog="Example: clipcore plan torch:nets:build tensorflow:nets_keras:build --sample 1,3,32,32")
def plan(
    source: Source,
    target: Target,
    sample: Sample = None,
    source_weights: Weights = None,
    target_weights: Weights = None,
    rules: Rules = None,
    strict: Strict = False,
    unmapped: Unmapped = "refuse",
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Write the plan here, as JSON.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find where each tensor of TARGET comes from in SOURCE; neither model is changed."""
    with session(as_json=as_json, debug=debug) as running:
        if output:
            check_output(output)
        x = parse_sample(_needed(sample), seed)
        source_model = _load(running, source, source_weights)
        target_model = _load(running, target, target_weights)
        with running.step("finding the mapping"):
            found = cc.plan(
                source_model, target_model, sample=x, rules=parse_rules(rules), strict=strict, unmapped=unmapped
            )
        if output:
            found.save(output)
        running.answer(found.to_dict(), *views.plan(found))


@app.command(
    epilog="Example: clipcore migrate torch:nets:build tensorflow:nets_keras:build --source-weights b.pt "
    "--sample 1,3,32,32 --limit global_norm:10 --output a.weights.h5"
)
def migrate(
    source: Source,
    target: Target,
    output: Annotated[
        str, typer.Option(metavar="FILE", help="Where the target's weights go; the format follows the name.")
    ],
    sample: Sample = None,
    plan_file: PlanFile = None,
    rules: Rules = None,
    strict: Strict = False,
    unmapped: Unmapped = "refuse",
    limit: Annotated[
        str | None,
        typer.Option(
            metavar="LIMIT",
            help="Bound what moves: value:0.5, norm:1.0 or global_norm:1.0; with delta: in front, what it changes.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help='Round where the target\'s dtype is narrower: "target", or to bfloat16, float16 … first.',
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run both models afterwards and compare.")
    ] = True,
    source_weights: Weights = None,
    target_weights: Weights = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Copy the weights of SOURCE into TARGET, write them to a file, and verify."""
    with session(as_json=as_json, debug=debug) as running:
        check_output(output)
        bound = parse_limit(limit) if limit else None
        x = parse_sample(_needed(sample), seed) if verify or not plan_file else None
        if plan_file and (rules or strict or unmapped != "refuse"):
            raise cc.InvalidInput(
                "--plan says where everything comes from: give --rule, --strict and --unmapped to clipcore plan instead"
            )
        found = {"sample": x, "rules": parse_rules(rules), "strict": strict, "unmapped": unmapped}
        given = {"plan": cc.Plan.load(plan_file)} if plan_file else found
        check_weight_file(output, target)
        source_model = _load(running, source, source_weights)
        target_model = _load(running, target, target_weights)
        with running.step("migrating"):
            result = cc.migrate(source_model, target_model, limit=bound, dtype=dtype, **given)
            _save(cc.get_backend(target.partition(":")[0]), target_model, output)
        check = None
        if verify:
            with running.step("verifying"):
                check = cc.verify(source_model, target_model, sample=x, plan=result.plan)
        document = {**result.to_dict(), "output": output, "verification": check.to_dict() if check else None}
        running.answer(document, *views.migration(result, output), *(views.verification(check) if check else ()))
        if check and not check.ok:
            raise typer.Exit(NOT_VERIFIED)


@app.command(
    epilog="Example: clipcore verify torch:nets:build tensorflow:nets_keras:build --source-weights b.pt "
    "--target-weights a.weights.h5 --sample 1,3,32,32"
)
def verify(
    source: Source,
    target: Target,
    sample: Sample = None,
    plan_file: PlanFile = None,
    source_weights: Weights = None,
    target_weights: Weights = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Look for every difference, and test what may be its cause.")
    ] = False,
    report: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Explain, and write a page with both models' layers side by side."),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run both models and say whether they compute the same, else where they part and why."""
    with session(as_json=as_json, debug=debug) as running:
        if report:
            check_output(report)
        x = parse_sample(_needed(sample), seed)
        known = cc.Plan.load(plan_file) if plan_file else None
        source_model = _load(running, source, source_weights)
        target_model = _load(running, target, target_weights)
        with running.step("verifying"):
            check = cc.verify(source_model, target_model, sample=x, plan=known, explain=explain or bool(report))
        if report:
            check.save_html(report)
        running.answer(check.to_dict(), *views.differences(check), *views.verification(check))
        if not check.ok:
            raise typer.Exit(NOT_VERIFIED)


@app.command(epilog="Example: clipcore diff torch:nets:build tensorflow:nets_keras:build --plan b.plan.json")
def diff(
    source: Source,
    target: Target,
    sample: Sample = None,
    plan_file: PlanFile = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the settings in which layers of SOURCE and TARGET differ: eps, strides, padding, activations …"""
    with session(as_json=as_json, debug=debug) as running:
        x = parse_sample(sample, seed) if sample else None
        known = cc.Plan.load(plan_file) if plan_file else None
        source_model, target_model = _load(running, source, None), _load(running, target, None)
        with running.step("comparing the layers"):
            found = cc.diff(source_model, target_model, known, sample=x)
        running.answer({"differences": [asdict(difference) for difference in found]}, *views.listed(found))


def _load(running: Session, name: str, weights: str | None) -> Any:
    with running.step(f"loading {name}"):
        return load_model(name, weights)


def _needed(sample: str | None) -> str:
    if sample is None:
        raise cc.InvalidInput(
            "running the models needs an input: add --sample x.npy, or a shape as in --sample 1,3,32,32"
        )
    return sample


def _save(backend: Any, model: Any, path: str) -> None:
    """Write the model's weights, the whole file or none of it."""
    # in a folder beside it, so that the name, which the format follows, stays what the user wrote
    with tempfile.TemporaryDirectory(dir=Path(path).resolve().parent, prefix=".clipcore-") as folder:
        unfinished = os.path.join(folder, os.path.basename(path))
        backend.save_weights(model, unfinished)
        os.replace(unfinished, path)
