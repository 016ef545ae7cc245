"""What can be measured on one GPU machine without a network, in pieces of ten minutes: see PENDING.md."""
