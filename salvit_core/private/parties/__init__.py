"""The parties' processes: what each does, how they meet, and how they are started on one machine."""
