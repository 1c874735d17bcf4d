"""Other trainers, one module each, measured by ``benchmark.py --peers``.

A module's ``measure(task)`` gets ``users`` and ``items`` (paths of .npy files of dense int32
indices), ``num_users``, ``num_items``, ``dim``, ``batch_size``, ``negatives`` (per positive),
``threads`` and ``seconds``, and answers with what ``timing.repeated`` gives, ``amount`` (positives
in a repeat), ``unit``, ``version`` and ``peak_memory_mb``. It runs in a process of its own, under
the first interpreter that has its library, and knows nothing of recclr. Tables of bags have a task
of their own (``bench.bags``).
"""
