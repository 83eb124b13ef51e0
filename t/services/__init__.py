"""What the tests and the demo run against: local stand-ins for Azure's services, and real Celery workers.

All of them listen on 127.0.0.1 only, on a free port, and end with the process that started them. They need Linux or
another POSIX system.
"""
