"""04_lora: put LoRA on the right layers, and say which those are.

    python 04_lora.py runs/demo [--force]

Reads:  01_config/config.json; 03_load_model/model.json.
Writes: 04_lora/adapter/ (PEFT format, before training), adapter.json (what trains, by role).
Source: LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732); DoRA (arXiv 2402.09353).
Fork me to: adapt other layers (lib/models/roles.py:lora_linears) or use another PEFT method
        (lib/models/adapter.py:lora_config).
"""
import json
from collections import Counter

from lib.models import model
from lib.models.adapter import adapted_experts
from lib.models.plan import on_meta, read_plan
from lib.models.roles import Roles
from lib.models.saved import save_adapter
from lib.run import stage, terminal
from lib.run.errors import StageError
from lib.run.ledger import write_json

LEARNS_WORDS = {"language", "cross_attention", "experts"}          # roles without which answers hardly change


def main(argv=None):
    """Make the adapter without loading the base, or list what full fine-tuning trains."""
    args = stage.arguments(__doc__).parse_args(argv)
    run = stage.resolve_run(args.run)

    # 1. Start the stage, unless its outputs are still true.
    work = stage.begin(stage.decide("04_lora", run, force=args.force))
    if work is None:
        return
    plan = read_plan(work)
    # 2. Choose what trains, by role: an adapter's tensors, or the base's own.
    facts = adapter(plan, work) if work.config.adapter else full_fine_tuning(plan, work)
    # 3. Write it down; 05 trains this and compares.
    write_json(work.path / "adapter.json", facts)
    print_facts(facts, plan["parameters"])
    work.finish()


def adapter(plan: dict, work) -> dict:
    """The content of adapter.json for an adapter, new or trained further, which is saved in the folder."""
    if work.config.lora_model_dir:
        work.uses(work.config.lora_model_dir)
    peft_model, hits = model.new_adapter(plan, work.config)
    if not hits.keys() & LEARNS_WORDS:
        where = ", ".join(f"{role} ({len(names)})" for role, names in hits.items())
        terminal.warn(f"the adapter is on {where} alone: the language model stays as it is")
    save_adapter(peft_model, work.path / "adapter")
    trained = Roles.of_plan(plan).count(model.trained_parameters(peft_model).items())
    config = peft_model.peft_config["default"]
    method = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return {"method": f"{method} r={config.r} alpha={config.lora_alpha}", "lora_r": config.r,
            "targets": config.target_modules,
            "modules": {role: len(names) for role, names in sorted(hits.items())},
            "trained_parameters": dict(sorted(trained.items())),
            "experts": adapted_experts(peft_model), "new_rows": len(plan["new_rows"]),
            "first_hits": {role: names[:3] for role, names in sorted(hits.items())}}


def full_fine_tuning(plan: dict, work) -> dict:
    """The content of adapter.json for full fine-tuning: which roles of the base train."""
    if quantised := plan["quantisation"]:
        raise StageError(f"base_model: full fine-tuning can't train the {quantised['bits']}-bit weights of "
                         f"{plan['base_model']}", "adapter: lora")
    wanted = work.config.train_roles
    meta, roles = on_meta(plan), Roles.of_plan(plan)
    there = roles.count((name, p) for name, p in meta.named_parameters() if not roles.is_idle(name))
    if "head" in wanted and plan["tied_head"] and "embedding" not in wanted:
        raise StageError(f"train_roles: the head of {plan['class']} is its embedding, one tensor",
                         "name embedding instead of head")
    lacking = [role for role in ("embedding", "head") if role in there and role not in wanted]
    if plan["new_rows"] and wanted != ["all"] and lacking:
        raise StageError(f"train_roles: rows of new tokens would stay as they are in {' and '.join(lacking)}",
                          f"train_roles: {json.dumps(wanted + lacking)}")
    if not there.keys() & set(wanted) and wanted != ["all"]:
        raise StageError(f"train_roles: {plan['class']} has no {', '.join(wanted)}",
                         f"choose among {', '.join(there)}")
    named, names = work.config.unfrozen_parameters, [name for name, _ in meta.named_parameters()]
    for regex in named or ():
        if not any(model.trains(name, roles, ["all"], [regex]) for name in names):
            raise StageError(f"unfrozen_parameters: {plan['class']} has no parameter named {regex!r}",
                             f"names begin as in {names[0]}")
    model.train_roles(meta.requires_grad_(False), roles, wanted, named)
    trained = roles.count((name, p) for name, p in meta.named_parameters() if p.requires_grad)
    modules = Counter()
    for name, module in meta.named_modules():
        modules[roles.of(name)] += any(p.requires_grad for p in module.parameters(recurse=False))
    if not trained:
        raise StageError(f"unfrozen_parameters: none that trains is named so in {plan['class']}",
                         "name parameters of train_roles")
    return {"method": "full fine-tuning", "targets": None,
            "modules": {role: modules[role] for role in trained}, "trained_parameters": dict(trained),
            "experts": 0, "new_rows": 0, "first_hits": {}}


def print_facts(facts: dict, parameters: dict[str, int]) -> None:
    """Print what trains, as a table by role, and whether the experts do."""
    modules, trained, total = facts["modules"], facts["trained_parameters"], sum(parameters.values())
    rows = [[role, modules.get(role, 0), count, f"{count / total:.2%}"] for role, count in trained.items()]
    rows.append(["all", sum(modules.values()), sum(trained.values()), f"{sum(trained.values()) / total:.2%}"])
    terminal.table(f"what trains: {facts['method']}", ["role", "modules", "parameters", "of the base"], rows)
    if facts["new_rows"]:
        terminal.say(f"new tokens: {facts['new_rows']} rows of embedding and head train, no other row does")
    if facts["experts"]:
        terminal.say(f"{facts['experts']} experts train, each with matrices of its own")
    elif "experts" in parameters and "experts" not in trained:
        terminal.say(f"no expert trains, {parameters['experts'] / total:.0%} of the base; "
                     "lora_target_roles: [language, experts] would train them, too")


if __name__ == "__main__":
    stage.run_script(main)
