"""The configuration of a Ceph cluster for tests: one monitor, one disk, small, quick and on loopback."""

from __future__ import annotations

from pathlib import Path

STORE_BYTES = 8 << 30
"""Of the simulated disk: a sparse file, or a limit on the memory."""


def ceph_conf(folder: Path, *, fsid: str, store: str, mon_port: int, gateway_port: int) -> str:
    """The text of ceph.conf. `store` is "memstore", or "bluestore" for data that outlives the daemons.

    Every daemon writes below `folder` and listens on 127.0.0.1 only. The intervals are short so that a
    start takes seconds, and deleted objects go soon: the tests share one disk.
    """
    return f"""\
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{mon_port}
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_supported = none
auth_allow_insecure_global_id_reclaim = true
mon_warn_on_insecure_global_id_reclaim_allowed = false
mon_warn_on_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_max_pg_per_osd = 2000
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
osd_mon_report_interval = 1
log_file = {folder}/log/$name.log
log_to_stderr = false
err_to_stderr = true
admin_socket = {folder}/run/$name.asok
crash_dir = {folder}/run
run_dir = {folder}/run
[mon]
mon_data = {folder}/mon
mon_data_avail_warn = 1
mon_data_avail_crit = 1
[osd]
osd_data = {folder}/osd
osd_journal = {folder}/osd/journal
osd_objectstore = {store}
memstore_device_bytes = {STORE_BYTES}
bluestore_block_size = {STORE_BYTES}
bluestore_fsck_on_mount = false
bluestore_block_wal_create = false
bluestore_block_db_create = false
osd_memory_target = 1073741824
osd_crush_update_on_start = false
osd_class_update_on_start = false
osd_class_load_list = *
osd_class_default_list = *
[client.rgw.a]
rgw_data = {folder}/rgw
log_file = {folder}/log/rgw.log
rgw_frontends = beast endpoint=127.0.0.1:{gateway_port} tcp_nodelay=1
rgw_dns_name = localhost
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 10
rgw_gc_processor_max_time = 10
rgw_thread_pool_size = 64
rgw_run_sync_thread = false
rgw_bucket_quota_ttl = 0
rgw_override_bucket_index_max_shards = 1
rgw_dynamic_resharding = false
"""
