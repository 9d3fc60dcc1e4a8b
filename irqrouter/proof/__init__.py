"""The proof: a real guest that counts, devices that fire, and the books that must balance.

Read ``ledger.py`` first: it says what an event may become. Then ``driver.py`` (what the guest does meanwhile),
``devices.py`` (who fires and keeps the books), ``guest.py`` (who counts) and ``scenario.py`` (all of it together).

``routing.py`` says what is proved: a router in this process, or (``served.py``) an agent whose decisions come from a
service. ``service.py`` is that service as a process, ``chaos.py`` who kills it, ``torture.py`` both together.
"""
