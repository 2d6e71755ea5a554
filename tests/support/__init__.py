"""What several tests share: titan's command as a process, planted faults, a reader of the sources."""
