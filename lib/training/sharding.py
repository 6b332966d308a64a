"""sharding: the frozen base sharded over ranks by FSDP2, for models that don't fit one device.

Only the decoder layers of the language model, which hold most of the weights, are sharded. The tower,
embeddings and head are on every rank, and so is the adapter, whose gradients parallel.py sums as without
sharding: so a rank without pictures runs the same collectives as the others, and checkpoints are the same.

Source: PyTorch FSDP2, torch.distributed.fsdp.fully_shard; ZeRO-3 (arXiv 1910.02054).
Fork me to: shard other roles, or keep layers gathered between forward and backward.
"""
from lib.models.roles import Roles, base_name
from lib.run import terminal
from lib.training.parallel import World


def shard(model, roles: Roles, world: World) -> None:
    """Shard the language model's layers and move the model to the rank's device, its adapter whole.

    From then on every rank must run as many forwards and backwards as the others (`Samples.even`).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not {roles.of(base_name(name)) for name in trained} & {"language", "cross_attention", "experts"}:
        model.get_input_embeddings().register_forward_hook(with_gradient)
    whole = {*trained.values()}
    layers = [layer for role, layer in roles.layers(model) if role == "language"]
    for layer in layers:                  # one after the other: no device ever holds two whole layers
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    inside = {p for layer in layers for p in layer.parameters()}
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p not in inside} | whole)
    model.to(world.device)
    if world.is_leader:
        parts = [p for p in model.parameters() if isinstance(p, DTensor)]
        own, every = (sum(p.to_local().nbytes for p in parts), sum(p.nbytes for p in parts))
        terminal.say(f"{len(layers)} layers sharded over {world.world_size} ranks: "
                     f"{own / 2**20:,.2f} of {every / 2**20:,.2f} MiB here")


def with_gradient(module, inputs, embedded):
    """A hook: embeddings that ask for a gradient, so that every rank's backward gathers every layer.

    Where a tower trains alone, a rank without pictures would have no backward, and the others would wait.
    """
    return embedded if embedded.requires_grad else embedded.requires_grad_().clone()  # no leaf: written into
