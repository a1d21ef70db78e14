"""Numbers of system calls by architecture: those a program may make, and those it is refused.

An entry is name:x86_64:aarch64, `-` where the architecture has no such call. What is in neither
list is answered as a call that the kernel does not have (ENOSYS), so that libraries take the older
way, and a call that a later kernel adds is not allowed by being unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

ALLOWED = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69
pwritev:296:70 preadv2:327:286 pwritev2:328:287 lseek:8:62 close:3:57 close_range:436:436
dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 open:2:- openat:257:56 creat:85:- stat:4:-
fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44 access:21:-
faccessat:269:48 faccessat2:439:439 readlink:89:- readlinkat:267:78 getdents:78:-
getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 mkdir:83:- mkdirat:258:34 rmdir:84:-
unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276 link:86:- linkat:265:37
symlink:88:- symlinkat:266:36 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83
umask:95:166 flock:73:32 fadvise64:221:223 sendfile:40:71 copy_file_range:326:285 fcntl:72:25
ioctl:16:29 mmap:9:222 mprotect:10:226 munmap:11:215 mremap:25:216 madvise:28:233 msync:26:227
mincore:27:232 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
rt_sigpending:127:136 rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132
restart_syscall:219:128 pause:34:- alarm:37:- kill:62:129 tgkill:234:131 futex:202:98
set_robust_list:273:99 rseq:334:293 set_tid_address:218:96 clone:56:220 exit:60:93
exit_group:231:94 wait4:61:260 waitid:247:95 sched_yield:24:124 sched_getaffinity:204:123
getcpu:309:168 prctl:157:167 getpid:39:172 gettid:186:178 getppid:110:173 getuid:102:174
geteuid:107:175 getgid:104:176 getegid:108:177 getpgrp:111:- getpgid:121:155 getsid:124:156
getgroups:115:158 getresuid:118:148 getresgid:120:150 getrlimit:97:163 setrlimit:160:164
prlimit64:302:261 getrusage:98:165 times:100:153 getpriority:140:141 clock_gettime:228:113
clock_getres:229:114 clock_nanosleep:230:115 nanosleep:35:101 gettimeofday:96:169 time:201:-
getitimer:36:102 setitimer:38:103 timer_create:222:107 timer_settime:223:110 timer_gettime:224:108
timer_getoverrun:225:109 timer_delete:226:111 timerfd_create:283:85 timerfd_settime:286:86
timerfd_gettime:287:87 uname:63:160 sysinfo:99:179 getrandom:318:278 select:23:- pselect6:270:72
poll:7:- ppoll:271:73 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:-
epoll_pwait:281:22 eventfd:284:- eventfd2:290:19 socketpair:53:199 recvfrom:45:207 recvmsg:47:212
sendto:44:206 shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209
"""
"""What Python and its usual libraries do in one process, in files they may open. Some of them with
conditions: see `seccomp.py`."""

REFUSED = """
socket:41:198 connect:42:203 bind:49:200 listen:50:201 accept:43:202 accept4:288:242
sendmsg:46:211 sendmmsg:307:269 recvmmsg:299:243 setsockopt:54:208 fork:57:- vfork:58:-
execve:59:221 execveat:322:281 setsid:112:157 setpgid:109:154 ptrace:101:117
process_vm_readv:310:270 process_vm_writev:311:271 process_madvise:440:440
process_mrelease:448:448 kcmp:312:272 pidfd_open:434:434 pidfd_getfd:438:438
pidfd_send_signal:424:424 tkill:200:130 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240
mount:165:40 umount2:166:39 pivot_root:155:41 chroot:161:51 open_tree:428:428 move_mount:429:429
fsopen:430:430 fsconfig:431:431 fsmount:432:432 fspick:433:433 mount_setattr:442:442
swapon:167:224 swapoff:168:225 quotactl:179:60 unshare:272:97 setns:308:268 bpf:321:280
perf_event_open:298:241 keyctl:250:219 add_key:248:217 request_key:249:218 userfaultfd:323:282
io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427 io_setup:206:0
io_submit:209:2 kexec_load:246:104 kexec_file_load:320:294 reboot:169:142 init_module:175:105
finit_module:313:273 delete_module:176:106 acct:163:89 syslog:103:116 sethostname:170:161
setdomainname:171:162 settimeofday:164:170 clock_settime:227:112 adjtimex:159:171
clock_adjtime:305:266 setuid:105:146 setgid:106:144 setreuid:113:145 setregid:114:143
setresuid:117:147 setresgid:119:149 setgroups:116:159 setfsuid:122:151 setfsgid:123:152
capset:126:91 personality:135:92 chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452
chown:92:- fchown:93:55 lchown:94:- fchownat:260:54 utime:132:- utimes:235:- futimesat:261:-
utimensat:280:88 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14
lremovexattr:198:15 fremovexattr:199:16 truncate:76:45 mknod:133:- mknodat:259:33
name_to_handle_at:303:264 open_by_handle_at:304:265 memfd_create:319:279 memfd_secret:447:447
shmget:29:194 shmat:30:196 shmctl:31:195 semget:64:190 semop:65:193 semctl:66:191 msgget:68:186
msgsnd:69:189 msgctl:71:187 mq_open:240:180 mq_unlink:241:181 sched_setaffinity:203:122
sched_setscheduler:144:119 sched_setparam:142:118 sched_setattr:314:274 setpriority:141:140
ioprio_set:251:30 migrate_pages:256:238 move_pages:279:239 sync:162:81 syncfs:306:267
vhangup:153:58 iopl:172:- ioperm:173:- modify_ldt:154:- fanotify_init:300:262 splice:275:76
vmsplice:278:75 tee:276:77
"""
"""Answered by EPERM: other processes, networks, modes, owners and times of files (which Landlock
does not guard), memory that outlives a process, the machine itself."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """audit: the kernel's number of it in a filter's data. calls, refused: number by name.
    x32: whether numbers from `X32_BIT` on mean another ABI of the same processor."""

    audit: int
    calls: Mapping[str, int]
    refused: Mapping[str, int]
    x32: bool = False


X32_BIT = 0x40000000


def architecture(machine: str) -> Architecture | None:
    """The tables of `os.uname().machine`; None for one that has none here."""
    if machine == "x86_64":
        return Architecture(
            audit=0xC000003E, calls=_column(ALLOWED, 0), refused=_column(REFUSED, 0), x32=True
        )
    if machine in ("aarch64", "arm64"):
        return Architecture(
            audit=0xC00000B7, calls=_column(ALLOWED, 1), refused=_column(REFUSED, 1)
        )
    return None


def _column(table: str, column: int) -> Mapping[str, int]:
    entries = (entry.split(":") for entry in table.split())
    return MappingProxyType({name: int(n[column]) for name, *n in entries if n[column] != "-"})
