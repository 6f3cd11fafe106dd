"""Trains a small model of the served architecture until it finds needles, and measures that it does.

    tokenizer.py   our own vocabulary: the words of our texts, numbers, bytes
    drills.py      repeated spans, keys and values: what is learnt before text
    samples.py     training conversations, made without end from our own generators
    batches.py     one step's samples as tensors
    forward.py     the served modules' arithmetic, differentiable, for whole sequences
    losses.py      answers by cross-entropy, the indexer by the divergence from attention
    recipe.py      the phases: dense with a growing length, indexer alone, sparse
    trainer.py     the first weights and the loop; state.py saves and resumes it bit for bit
    export.py      the checkpoint in Hugging Face layout, its config, card and sha256
    evaluate.py    RULER accuracy, needle recall and the shuffled control, on the served model

Knows neither the engine nor the tracer.

    Trainer(TINY, Recipe.tiny(), word_tokenizer(), Path("run")).run()    # train_tiny.py --out run
"""
