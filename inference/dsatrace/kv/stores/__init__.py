"""Where KV units lie when they are not in the model's cache: memory, files, remote stores.

`interface` holds the contract every store keeps, `opening` turns `ram`, `file:PATH`,
`redis://...` into a store. Nothing is imported here, so that a run without tiers loads
neither numba's kernels nor a client.

    from dsatrace.kv.stores.opening import open_store
"""
