"""RULER (Hsieh et al. 2024): 13 synthetic long-context tasks, read from files or made on the spot.

    example.py    the tasks; one example, its score, and which tokens of its prompt hold the answer
    reader.py     rows -> examples; files.py finds them in folders and archives
    generator.py  examples of a given length; plans.py and qa.py build the prompts
    texts.py      every sentence of a prompt; words.py and essay.py what the haystacks are made of

Knows no model and no trace: a caller feeds the prompts and brings predictions.

    for example in generate("niah_single_1", 2048, tokenizer, num_examples=10):
        ids = encode_chat([Message("user", example.prompt)], tokenizer, answer_prefix=example.answer_prefix)
"""
