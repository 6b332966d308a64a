"""04_lora: put LoRA on the right layers, and say which those are.

    python 04_lora.py runs/demo [--force]

Reads:  01_config/config.json; 03_load_model/model.json.
Writes: 04_lora/adapter/ (PEFT format, before training), adapter.json (what trains, by role).
Source: LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732); DoRA (arXiv 2402.09353).
Fork me to: adapt other layers (lib/registry.py:lora_linears) or use another PEFT method (lib/model.py:lora_config).
"""
import json
from collections import Counter

from lib import model, stage, terminal
from lib.registry import Roles
from lib.stage import StageError


def main(argv=None):
    """Make the adapter without loading the base, or list what full fine-tuning trains."""
    args = stage.arguments(__doc__).parse_args(argv)
    run = stage.resolve_run(args.run)

    # 1. Start the stage, unless its outputs are still true.
    work = stage.begin(stage.decide("04_lora", run, force=args.force))
    if work is None:
        return
    plan = json.loads((work.input("03_load_model") / "model.json").read_text(encoding="utf-8"))
    # 2. Choose what trains, by role: an adapter's tensors, or the base's own.
    if work.config.adapter is None:
        facts = full_fine_tuning(plan, work.config)
    else:
        facts = adapter(plan, work)
    # 3. Write it down; 05 trains this and compares.
    (work.path / "adapter.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    total = sum(plan["parameters"].values())
    rows = [[role, facts["modules"].get(role, 0), count, f"{count / total:.2%}"]
            for role, count in facts["trained_parameters"].items()]
    rows.append(["all", sum(facts["modules"].values()), sum(facts["trained_parameters"].values()),
                 f"{sum(facts['trained_parameters'].values()) / total:.2%}"])
    terminal.table(f"what trains: {facts['method']}", ["role", "modules", "parameters", "of the base"], rows)
    work.finish()


def adapter(plan: dict, work) -> dict:
    """Facts of a new adapter, which is saved in the stage's folder; StageError where it hits nothing."""
    peft_model, hits = model.new_adapter(plan, work.config)
    if not hits:
        raise StageError(f"lora_target_modules: {work.config.lora_target_modules!r} matches no layer of {plan['class']}",
                         f"leave it out, or use the names of `python 03_load_model.py {work.run} --plan-only`")
    roles = Roles.of_plan(plan)
    trained = Counter()
    for name, parameter in model.trained_parameters(peft_model).items():
        trained[roles.of(model.base_name(name))] += parameter.numel()
    if not hits.keys() & {"language", "cross_attention", "experts"}:
        terminal.warn(f"the adapter is only on {', '.join(map(str, hits))}: the language model won't learn")
    model.save_adapter(peft_model, work.path / "adapter")
    config = peft_model.peft_config["default"]
    method = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return {"method": f"{method} r={config.r} alpha={config.lora_alpha}", "targets": config.target_modules,
            "modules": {role: len(names) for role, names in sorted(hits.items())},
            "trained_parameters": dict(sorted(trained.items())), "first_hits": {r: n[:3] for r, n in sorted(hits.items())}}


def full_fine_tuning(plan: dict, config) -> dict:
    """Facts of full fine-tuning: which roles of the base train."""
    meta, roles = model.on_meta(plan), Roles.of_plan(plan)
    trained = model.count_parameters(meta, roles, idle=False)
    wanted = list(trained) if config.train_roles == ["all"] else config.train_roles
    missing = [role for role in wanted if role not in trained]
    if missing:
        raise StageError(f"train_roles: {plan['class']} has no parameters of role {', '.join(missing)}"
                         + (" of its own: the head is the embedding" if "head" in missing and plan["tied_head"] else ""),
                         f"choose among {', '.join(trained)}")
    modules = Counter(roles.of(name) for name, module in meta.named_modules()
                      if list(module.parameters(recurse=False)) and not roles.is_idle(name))
    return {"method": "full fine-tuning", "targets": None, "modules": {role: modules[role] for role in wanted},
            "trained_parameters": {role: trained[role] for role in wanted}, "first_hits": {}}


if __name__ == "__main__":
    stage.run_script(main)
