"""The example's model: how a GPT-2 is recognised, converted, exported and loaded.

    kind             what the library's import and export ask of it     (engine.convert.model_kinds)
    tensors          a GPT-2 among a source's tensors, in our layout    (settings)
    hf_export        --format hf                                        (tokenizer_files)
    resumable        what our trainer expects of an imported checkpoint (trainer_flags)
    load_model       a model in memory                                  (sample)
    own_packages     `model` and `data` are ours, whatever lies in the working directory

It belongs to the trainer: the library imports none of it.
"""
