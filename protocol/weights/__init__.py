"""New weights on their way to the servers: what a version is, how its file is laid out, how its bytes travel.

    specs.py      tensors and the safetensors layout, as arithmetic
    adapters.py   versions that are an addition to a base model
    base_model.py whether two sides have the same one
    manifest.py   names, places and digests of a version
    layout.py     that layout mapped into memory
    staging.py    where such files live, and who owns them
    claims.py     who reads or writes one at the moment
    shared.py     one version in the memory of one host, read where it lies
    chunks.py     which bytes have arrived (pure)
    assembly.py   those bytes put in place and verified
    delta.py      what differs between two tensors, as few bytes
    delta_manifest.py  what leads from one version to the next
    serving.py    one end of the bulk plane: bytes out
    filling.py    what of a version may be passed on while it arrives (pure)
    parking.py    requests for what is not here yet (pure)
    fetching.py   the other end: bytes in
    sources.py    from whom, of several (pure)

Invariant kept here: I5, the bytes accepted as version v hash to manifest v; never half a version.
"""
