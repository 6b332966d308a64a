"""What several stages run, and the machinery that a reader may skip without losing the idea of a stage.

Each file begins with a line on what it is for. By folder, about in the order of a run:

    config      the recipe: read, converted, checked
    run         the run folder: what a stage has to do, its files, the command line
    data        rows of any usual shape; rows to samples, with their lengths
    media       pictures, sounds and clips: found, decoded, bounded
    text        processor and chat template: tokens and labels
    models      families, plan, roles, loading, the adapter
    batches     order, packing, the loader
    training    loss, optimizer, ranks, checkpoints, metrics
    fast        inner parts of models in fewer operations; features kept
    memory      the forecast
    evaluation  answers and golden logits
    export      merged weights, the model card, the proof
    pages       preview, report, charts

and beside them registry.py (what a family's record decides), quant.py (the quantisation) and collator.py
(the batch).
"""
