"""From a storage's notification to a run: dialects of notifications, the receiver, the poller, and the submitter.

The commands and the flow `sweep` import it. It imports `tasks` and `flows.infer`, no other flow.
"""
