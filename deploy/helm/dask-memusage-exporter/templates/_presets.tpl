{{/*
How each deployment labels what there is to scrape, as it stands in their charts and controllers (the
versions are in docs/kubernetes.md). A port is a name, or a number where the name is not fixed.
*/}}
{{- define "memusage.presets" -}}
dask:
  clusterLabel: release
  scheduler: {selector: {matchLabels: {app: dask, component: scheduler}}, port: 8787}
  workers: {selector: {matchLabels: {app: dask, component: worker}}, port: dashboard}
operator:
  clusterLabel: dask.org/cluster-name
  scheduler: {selector: {matchLabels: {dask.org/component: scheduler}}, port: http-dashboard}
  workers: {selector: {matchLabels: {dask.org/component: worker}}, port: http-dashboard}
gateway:
  clusterLabel: gateway.dask.org/cluster
  scheduler: {selector: {matchLabels: {app.kubernetes.io/component: dask-scheduler}, matchExpressions: [{key: gateway.dask.org/cluster, operator: Exists}]}, port: dashboard}
  workers: {selector: {matchLabels: {app.kubernetes.io/component: dask-worker}, matchExpressions: [{key: gateway.dask.org/cluster, operator: Exists}]}, port: dashboard}
plain:
  clusterLabel: dask_cluster
  scheduler: {selector: {matchLabels: {}}, port: http-dashboard}
  workers: {selector: {matchLabels: {}}, port: http-dashboard}
{{- end -}}

{{/* The preset in use. */}}
{{- define "memusage.preset" -}}
{{- if eq .Values.cluster.kind "none" -}}{{ .Values.monitors.preset }}{{- else -}}{{ .Values.cluster.kind }}{{- end -}}
{{- end -}}

{{/* Whether our monitors are rendered: "true", or nothing. */}}
{{- define "memusage.monitors" -}}
{{- if and .Values.monitors.enabled (not .Values.monitors.upstreamEnabled) (include "memusage.preset" .) (include "memusage.hasMonitors" .) -}}true{{- end -}}
{{- end -}}

{{/* The label selector of a monitor. Arguments: root, part (scheduler, workers), role. */}}
{{- define "memusage.monitorSelector" -}}
{{- $values := .root.Values -}}
{{- $own := index $values.monitors .part -}}
{{- $preset := index (include "memusage.presets" .root | fromYaml) (include "memusage.preset" .root) -}}
{{- $selector := (index $preset .part).selector -}}
{{- if $own.selector -}}
{{- toYaml $own.selector -}}
{{- else if ne $values.cluster.kind "none" -}}
{{- dict "matchLabels" (include "memusage.podSelector" . | fromJson) | toYaml -}}
{{- else if and (eq $values.monitors.preset "dask") $values.monitors.release -}}
{{- mergeOverwrite $selector (dict "matchLabels" (dict "release" $values.monitors.release)) | toYaml -}}
{{- else -}}
{{- toYaml $selector -}}
{{- end -}}
{{- end -}}

{{/*
What both kinds of monitor have in common. Arguments: root, part, role, from (service, pod); exemplars,
whether it is the endpoint for them.
*/}}
{{- define "memusage.endpoint" -}}
{{- $monitors := .root.Values.monitors -}}
{{- $own := index $monitors .part -}}
{{- $preset := index (include "memusage.presets" .root | fromYaml) (include "memusage.preset" .root) -}}
{{- $port := default (index $preset .part).port $own.port -}}
{{- $label := default $preset.clusterLabel $monitors.clusterLabel -}}
{{- if kindIs "string" $port -}}
port: {{ $port }}
{{- else -}}
{{ ternary "targetPort" "portNumber" (eq .from "service") }}: {{ int $port }}
{{- end }}
path: {{ ternary "/memusage/metrics" $own.path (default false .exemplars) }}
interval: {{ $own.interval }}
{{- with $own.scrapeTimeout }}
scrapeTimeout: {{ . }}
{{- end }}
relabelings:
  - sourceLabels: [__meta_kubernetes_{{ .from }}_label_{{ regexReplaceAll "[^a-zA-Z0-9_]" $label "_" }}]
    targetLabel: dask_cluster
  {{- if .exemplars }}
  # `up` of both pages would be one series; rules and dashboards join whatever the job.
  - {sourceLabels: [job], targetLabel: job, replacement: "${1}-exemplars"}
  {{- end }}
  {{- with $own.relabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- /* As in the package's prometheus.yml: what the other page has is scraped there. */}}
{{- $elsewhere := and $monitors.exemplars.enabled (eq .part "scheduler") (not .exemplars) }}
{{- if or $elsewhere $own.metricRelabelings }}
metricRelabelings:
  {{- if $elsewhere }}
  - {sourceLabels: [__name__], regex: "(.+_)?scheduler_task_memory_.+", action: drop}
  {{- end }}
  {{- with $own.metricRelabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* A whole monitor. Arguments: root, kind, part, role, from, endpoints (its key). */}}
{{- define "memusage.monitor" -}}
{{- $monitors := .root.Values.monitors -}}
apiVersion: monitoring.coreos.com/v1
kind: {{ .kind }}
metadata:
  name: {{ include "memusage.fullname" .root }}-{{ .part }}
  namespace: {{ default .root.Release.Namespace $monitors.namespace }}
  labels:
    {{- include "memusage.labelsWith" (dict "root" .root "more" $monitors.additionalLabels) | nindent 4 }}
spec:
  namespaceSelector:
    {{- if $monitors.namespaceSelector }}
    {{- toYaml $monitors.namespaceSelector | nindent 4 }}
    {{- else }}
    matchNames: [{{ .root.Release.Namespace }}]
    {{- end }}
  selector:
    {{- include "memusage.monitorSelector" . | nindent 4 }}
  {{ .endpoints }}:
    - {{- include "memusage.endpoint" . | nindent 6 }}
    {{- if and $monitors.exemplars.enabled (eq .part "scheduler") }}
    - {{- include "memusage.endpoint" (merge (dict "exemplars" true) .) | nindent 6 }}
    {{- end }}
{{- end -}}
