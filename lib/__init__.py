"""What several stages run, and the machinery that a reader may skip without losing the idea of a stage.

Each file begins with a line on what it is for. By subject, about in the order of a run:

    the recipe             recipe reading knobs checks paths rules axolotl
    the run folder         stage decision ledger code folder program terminal errors versions
    rows as they come      sources hub files shapes messages parts
    rows to samples        rows measuring counting length samples summary
    text and labels        processor tekken vocabulary render turns template spans chat
    media                  locating fetch media pictures sounds clips resolution budget
    the model              families registry origin plan trainable kernels rope roles model shards quant gptq
    the adapter            adapter saved
    batches                order packing sampler collator
    the step               loss logits optim hooks steps devices parallel sharding
    around the step        watch checkpoint metrics trackers faults rehearsal
    fast paths             fast attention blocks adapted norms last alignment features store
    the forecast           forecast fit hollow on_cuda
    evaluation and export  evaluate predict compare golden merge fresh proof
    pages                  page charts scale preview seen tokens report answers facts card serving
"""
