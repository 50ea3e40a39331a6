"""Checkpoints from and to other tools: export, import, merge, compare. Off the training path.

    checkpoint   a committed checkpoint, opened for a long read          (tensors, contents)
    staging      a target that appears whole, or not at all
    torch_file, dcp_directory, safetensors_out                           what export writes
    incoming     a foreign checkpoint as a tree of tensors and values    (directories, file_kinds; pt_in,
                 dcp_in, safetensors_in, weights_in, deepspeed_in, trainer_in; elsewhere: what is refused)
    recognise    which part of that tree is model, optimizer, progress   (names, marker, flattened)
    optimizer    a foreign optimizer by our names                        (numbering, module_order)
    model_kinds  what a model that is known by name adds to both: the seam for the example's GPT-2
    publish      a new committed checkpoint from a draft                 (adopt, merge)

Everything streams: a few tens of MB of tensors are in memory at a time, or one tensor where it has to be
transposed or pickled whole.
"""
