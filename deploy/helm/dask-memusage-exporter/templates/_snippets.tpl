{{/*
What others' charts and resources need, as the notes and docs/kubernetes.md show it. Their pods start
without the ConfigMap too: where this chart is gone, or was never installed. Arguments: root, role.
*/}}

{{/* For a pod's specification. */}}
{{- define "memusage.snippetPod" -}}
{{- $values := .root.Values -}}
{{- if $values.package.install -}}
initContainers:
  - name: install-dask-memusage
    image: YOUR_IMAGE  # that of the container beside it
    {{- include "memusage.installerBody" .root | nindent 4 }}
{{ end -}}
volumes:
  - {name: dask-memusage-config, configMap: {name: {{ include "memusage.configMap" .root }}, optional: true}}
  {{- if $values.package.install }}
  - {name: dask-memusage, emptyDir: {sizeLimit: {{ $values.package.sizeLimit }}}}
  - {name: tmp, emptyDir: {}}
  {{- end }}
  {{- if and (eq .role "worker") (include "memusage.flight" .root) }}
  - {name: dask-memusage-flight, emptyDir: {sizeLimit: 16Mi}}
  {{- end }}
{{- end -}}

{{/* For its container. */}}
{{- define "memusage.snippetContainer" -}}
{{- $values := .root.Values -}}
env:
  - {name: DASK_CONFIG, value: {{ include "memusage.configPath" .root }}}
  {{- if $values.package.install }}
  - {name: PYTHONPATH, value: {{ $values.package.path }}/site}
  {{- end }}
  {{- with $values.config.environment }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumeMounts:
  {{- include "memusage.snippetMounts" . | nindent 2 }}
  {{- if $values.package.install }}
  - {name: dask-memusage, mountPath: {{ $values.package.path }}, readOnly: true}
  {{- end }}
{{- end -}}

{{- define "memusage.snippetMounts" -}}
- {name: dask-memusage-config, mountPath: {{ include "memusage.configPath" .root }}, readOnly: true}
{{- if eq .role "worker" }}
{{- with include "memusage.flight" .root }}
- {name: dask-memusage-flight, mountPath: {{ . }}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "memusage.snippet.dask" -}}
{{- $worker := dict "root" . "role" "worker" -}}
scheduler:
  env:  # nothing can be mounted there
    {{- if .Values.package.install }}
    - {name: EXTRA_PIP_PACKAGES, value: {{ append .Values.package.pipArgs (include "memusage.requirement" .) | join " " | quote }}}
    {{- end }}
    {{- range include "memusage.daskEnvironment" . | fromJsonArray }}
    - {{ toJson . }}
    {{- end }}
worker:
  env:
    {{- if .Values.package.install }}
    - {name: EXTRA_PIP_PACKAGES, value: {{ append .Values.package.pipArgs (include "memusage.requirement" .) | join " " | quote }}}
    {{- end }}
    - {name: DASK_CONFIG, value: {{ include "memusage.configPath" . }}}
    {{- with .Values.config.environment }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  mounts:
    volumes:
      - {name: dask-memusage-config, configMap: {name: {{ include "memusage.configMap" . }}, optional: true}}
      {{- if include "memusage.flight" . }}
      - {name: dask-memusage-flight, emptyDir: {sizeLimit: 16Mi}}
      {{- end }}
    volumeMounts:
      {{- include "memusage.snippetMounts" $worker | nindent 6 }}
{{- end -}}

{{- define "memusage.snippet.operator" -}}
spec:
  {{- range $role := list "scheduler" "worker" }}
  {{- $with := dict "root" $ "role" $role }}
  {{ $role }}:
    spec:
      {{- include "memusage.snippetPod" $with | nindent 6 }}
      containers:
        - name: {{ $role }}
          {{- include "memusage.snippetContainer" $with | nindent 10 }}
  {{- end }}
{{- end -}}

{{- define "memusage.snippet.gateway" -}}
gateway:
  backend:
    {{- range $role := list "scheduler" "worker" }}
    {{- $with := dict "root" $ "role" $role }}
    {{ $role }}:
      extraPodConfig:
        {{- include "memusage.snippetPod" $with | nindent 8 }}
      extraContainerConfig:
        {{- include "memusage.snippetContainer" $with | nindent 8 }}
    {{- end }}
  extraConfig:
    # Its own --preload hides configured ones. Images with Dask 2026.6 and newer: "dask", "scheduler".
    dask-memusage: |
      c.KubeClusterConfig.scheduler_cmd = ["dask-scheduler", "--preload", "dask_memusage_exporter"]
{{- end -}}

{{/* What the other charts' own monitors need, to set dask_cluster. */}}
{{- define "memusage.upstream.dask" -}}
scheduler:
  metrics:
    serviceMonitor:
      targetLabels: [release]
worker:
  metrics:
    podMonitor:
      targetLabels: [release]
      metricRelabelings: [{sourceLabels: [release], targetLabel: dask_cluster}]
{{- end -}}

{{- define "memusage.upstream.operator" -}}
metrics:
  scheduler:
    serviceMonitor:
      targetLabels: [dask.org/cluster-name, dask_cluster]
  worker:
    podMonitor:
      targetLabels: [dask.org/cluster-name, dask.org/workergroup-name, dask_cluster]
{{- end -}}

{{- define "memusage.upstream.gateway" -}}
relabelings:  # in each endpoint of your ServiceMonitor; in a PodMonitor pod_label in place of service_label
  - sourceLabels: [__meta_kubernetes_service_label_gateway_dask_org_cluster]
    targetLabel: dask_cluster
{{- end -}}
